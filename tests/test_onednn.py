"""Small volumes that torch keeps from oneDNN: which those are, and that oneDNN's answer is the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adaptconv
from adaptconv.backends import onednn
from adaptconv.problem import Device, Direction, Problem
from adaptconv.taps import TapPattern

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
ASKED = {"route": "onednn"}


def volume(
    batch: int, channels: int, spatial: tuple[int, ...], size: tuple[int, ...], dilation: int, pad: int
) -> Problem:
    taps = TapPattern.grid(size, (dilation,) * 3)
    return Problem(
        Direction.FORWARD, batch, channels, channels, 1, spatial, taps, (1, 1, 1), ((pad, pad),) * 3, "float32",
        "contiguous", Device.of(torch.device("cpu")),
    )  # fmt: skip


def test_what_torch_keeps_is_what_torch_says_it_keeps() -> None:
    loops = (torch._C._ConvBackend.Slow3d, torch._C._ConvBackend.SlowDilated3d)  # type: ignore[attr-defined]
    sizes = ((3, 3, 3), (5, 5, 3), (5, 4, 4), (1, 3, 5), (3, 5, 5), (1, 1, 1))
    answers = set()
    for batch, channels, spatial, size, dilation, padded in itertools.product(
        (1, 2), (64, 160, 161), ((8, 16, 16), (16, 8, 40)), sizes, (1, 2), (False, True)
    ):
        problem = volume(batch, channels, spatial, size, dilation, 2)
        zeros = 4 if padded else 0
        x = torch.empty(1).expand(batch, channels, *(extent + zeros for extent in spatial))
        w = torch.empty(1).expand(channels, channels, *size)
        pads = [0] * 3 if padded else [2] * 3
        chosen = torch._C._select_conv_backend(x, w, None, [1] * 3, pads, [dilation] * 3, False, [0] * 3, 1, None)
        assert onednn.keeps_volume(problem, padded=padded) == (chosen in loops), (problem, padded)
        answers.add(chosen in loops)
    assert answers == {True, False}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last_3d])
def test_the_op_is_sound(memory_format: torch.memory_format) -> None:
    x = torch.randn(1, 4, 6, 5, 7).contiguous(memory_format=memory_format)
    w, bias = torch.randn(6, 4, 3, 3, 3), torch.randn(6)
    arguments = (x, w, bias, [2, 2, 2], [1, 2, 1], [2, 2, 2])
    torch.library.opcheck(torch.ops.adaptconv.onednn.default, arguments)
    found = torch.ops.adaptconv.onednn(*arguments)
    right = F.conv3d(x.double(), w.double(), bias.double(), (1, 2, 1), 2, 2)
    torch.testing.assert_close(found.double(), right, rtol=1e-4, atol=1e-5)
    assert found.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_ask_onednn_where_it_is_the_plan(trains: bool, compiled: bool) -> None:
    model = nn.Sequential(nn.Conv3d(4, 6, 3, padding=2, dilation=2), nn.ReLU()).train(trains)
    x = torch.randn(1, 4, 6, 5, 7, requires_grad=trains)
    right, given = _results(model, x)
    with adaptconv.pinned("native", **ASKED):
        ours = adaptconv.optimize(model) if compiled else adaptconv.adapt(model)
        with torch.profiler.profile() as seen:
            found, ours_given = _results(ours, x)
    assert any(event.key == "adaptconv::onednn" for event in seen.key_averages())
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(ours_given, given, rtol=1e-4, atol=1e-4)
    if not compiled:
        plans = ours[0].plans
        assert plans is not None and plans.forward.choice.config["route"] == "onednn"


def _results(model: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    with torch.set_grad_enabled(x.requires_grad):
        y = model(x)
    return y, list(torch.autograd.grad(y.square().sum(), [x, *model.parameters()])) if x.requires_grad else []


def test_where_onednn_is_not_wanted_torch_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(1, 4, 6, 5, 7), torch.randn(6, 4, 3, 3, 3)
    right = F.conv3d(x, w, padding=1)
    asked = []
    monkeypatch.setattr(torch, "mkldnn_convolution", lambda *each: asked.append(each) or right)
    with adaptconv.pinned("native", **ASKED):
        adaptconv.conv3d(x, w, padding=1)
        assert len(asked) == 1
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(adaptconv.conv3d(x, w, padding=1), right)
        assert len(asked) == 1
        several = torch.func.vmap(lambda each: adaptconv.conv3d(each, w, padding=1))(torch.stack([x, 2 * x]))
        layer = nn.Sequential(adaptconv.AdaptiveConv3d(4, 6, 3, padding=1))
        program = torch.export.export(layer, (x,))
    torch.testing.assert_close(several[1], 2 * right, rtol=1e-4, atol=1e-4)
    assert not any("onednn" in str(node.target) for node in program.graph.nodes), "it runs where adaptconv is not"
