"""Tensors of more than 2^31 elements, of which a wide stride reads a few: offsets that wrapped would read elsewhere."""

from __future__ import annotations

import pytest
import torch

from adaptconv.backends import Config, backend_named
from adaptconv.problem import Device, Direction, Problem
from adaptconv.taps import TapPattern
from tests.triton.harness import DEVICE, RUNS

IMAGES, CHANNELS, EXTENT, STEP = 3, 32, 5900, 2900
FORMS = {"sparse": {}, "depthwise": {"form": "direct"}}


@RUNS
@pytest.mark.parametrize("name", FORMS)
def test_offsets_past_31_bits_are_right(name: str) -> None:
    groups = CHANNELS if name == "depthwise" else 1
    problem = Problem(
        Direction.FORWARD, IMAGES, CHANNELS, CHANNELS, groups, (EXTENT, EXTENT), TapPattern.grid((3, 3), (30, 30)),
        (STEP, STEP), ((0, 0), (0, 0)), "float16", "channels_last", Device.of(DEVICE),
    )  # fmt: skip
    assert IMAGES * CHANNELS * EXTENT**2 > 2**31 > CHANNELS * EXTENT**2
    generator = torch.Generator().manual_seed(0)
    # Only the pages that are written or read exist: 7 GB of addresses, a few MB of memory.
    size = (IMAGES, CHANNELS, EXTENT, EXTENT)
    x = torch.empty(size, dtype=torch.float16, device=DEVICE, memory_format=torch.channels_last)
    w = torch.randn(problem.weight_shape, generator=generator).div(17).half().to(DEVICE)
    reads = [o * STEP + 30 * t for o in range(problem.out_spatial[0]) for t in range(3)]
    values = torch.randn(IMAGES, CHANNELS, len(reads), len(reads), generator=generator).half().to(DEVICE)
    for i, row in enumerate(reads):
        for j, column in enumerate(reads):
            x[:, :, row, column] = values[:, :, i, j]
    backend = backend_named(name)
    assert backend.rejects(problem) is None
    config = Config({**backend.space(problem).default, **FORMS[name]})
    y = backend.run(problem, config, x, w)
    right = torch.nn.functional.conv2d(values.double(), w.double().unflatten(2, (3, 3)), stride=3, groups=groups)
    assert (y.double() - right).norm() / right.norm() < 1e-3
