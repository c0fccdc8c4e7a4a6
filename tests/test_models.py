"""The benchmark models, their data and the suites: real, deterministic and well formed."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adaptconv.problem import Direction
from adaptconv.taps import TapPattern
from benchmarks import data, models
from benchmarks.suites import SUITES, Layer

Small = tuple[nn.Module, Tensor, tuple[int, ...]]
LAYERS = [pytest.param(layer, id=f"{suite}-{layer.name}") for suite in ("cpu", "gpu") for layer in SUITES[suite]]


def _small_segmenter() -> Small:
    return models.AtrousSegmenter(classes=5, width=16, rates=(2, 4, 6)), torch.rand(2, 3, 64, 48), (2, 5, 64, 48)


def _small_denoiser() -> Small:
    return models.WingedDenoiser(channels=8, blocks=1), torch.randn(2, 1, 100), (2, 1, 100)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("small", [_small_segmenter, _small_denoiser])
def test_a_small_model_runs_both_ways_and_repeats_itself(small: Callable[[], Small], training: bool) -> None:
    outcomes = []
    for _ in range(2):
        torch.manual_seed(1)
        model, x, shape = small()
        y = model.train(training)(x.requires_grad_())
        assert tuple(y.shape) == shape
        y.square().mean().backward()
        gradients = [x.grad, *(p.grad for p in model.parameters())]
        assert all(g is not None and g.isfinite().all() for g in gradients)
        outcomes.append((y.detach(), gradients))
    torch.testing.assert_close(outcomes[0], outcomes[1])


@pytest.mark.parametrize("factory", [models.segmenter, models.denoiser])
def test_a_factory_gives_the_same_model_on_real_input_every_time(
    factory: Callable[[], tuple[nn.Module, tuple[Tensor]]],
) -> None:
    pytest.importorskip("pywt")
    state = torch.random.get_rng_state()
    (model, inputs), (again, _) = factory(), factory()
    assert torch.equal(torch.random.get_rng_state(), state)  # the caller's random numbers are left alone
    assert not model.training
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, again.state_dict()[name], msg=name)
    with torch.no_grad():
        y = model(*inputs)
    assert y.isfinite().all() and y.shape[0] == inputs[0].shape[0] and y.shape[2:] == inputs[0].shape[2:]
    assert 0.05 < y.std() < 20  # batch norms have seen the input: the signal neither dies nor explodes


def test_the_models_hold_the_convolutions_they_are_there_for() -> None:
    convolutions = [m for m in models.AtrousSegmenter().modules() if isinstance(m, nn.Conv2d)]
    depthwise = [c for c in convolutions if c.groups == c.in_channels > 1]
    assert any(c.dilation[0] > 1 and c.kernel_size[0] == 3 for c in depthwise)
    assert any(c.kernel_size[0] >= 17 for c in depthwise)
    assert any(c.kernel_size[0] == 7 and c.dilation[0] == 3 for c in depthwise)
    assert max(c.dilation[0] for c in convolutions) * 8 > models.PHOTOGRAPH_PIXELS // 2


def test_an_island_and_its_wings_are_one_partially_dilated_kernel() -> None:
    block = models.WingedBlock(4)
    taps = TapPattern.grid(5).union(TapPattern.grid(11, 2))
    assert str(taps) == "101010101111101010101"
    x = torch.randn(2, 4, 60, dtype=torch.float64)
    block.double()
    kernel = nn.functional.pad(block.island.weight, (8, 8)).clone()
    kernel[..., ::2] += block.wings.weight
    assert {int(t) for t in kernel.detach()[0, 0].nonzero()} == {offset for (offset,) in taps.offsets}
    whole = nn.functional.conv1d(x, kernel, block.island.bias, padding=10, groups=4)
    torch.testing.assert_close(block.island(x) + block.wings(x), whole)


def test_the_photograph_is_a_picture() -> None:
    pytest.importorskip("pywt")
    picture = data.photograph()
    assert picture.shape == (1, 3, 512, 512) and picture.dtype == torch.float32 and picture.is_contiguous()
    assert picture.isfinite().all() and picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.1
    small = data.photograph(96)
    assert small.shape == (1, 3, 96, 96)
    torch.testing.assert_close(small.mean(), picture.mean(), rtol=0, atol=0.01)
    with pytest.raises(ValueError, match="got 513"):
        data.photograph(513)


def test_the_electrocardiogram_is_windows_of_one_recording() -> None:
    pytest.importorskip("pywt")
    windows = data.electrocardiogram(5, 512)
    assert windows.shape == (5, 1, 512) and windows.dtype == torch.float32 and windows.isfinite().all()
    torch.testing.assert_close(windows.mean(dim=2), torch.zeros(5, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(windows.std(dim=2, correction=0), torch.ones(5, 1))
    assert len({tuple(window.flatten().tolist()) for window in windows}) == 5
    assert data.electrocardiogram().shape == (1, 1, 1024)
    with pytest.raises(ValueError, match="1024 samples"):
        data.electrocardiogram(1, 1025)
    with pytest.raises(ValueError, match="3 different windows"):
        data.electrocardiogram(4, 1022)


def test_without_pywavelets_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pywt.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install -e \.\[demo\]"):
        data.photograph()


@pytest.mark.parametrize("layer", LAYERS)
def test_every_layer_is_a_problem(layer: Layer) -> None:
    problem = layer.problem(Direction.GRAD_WEIGHT)
    assert problem.direction is Direction.GRAD_WEIGHT and problem.layout == "contiguous"
    assert problem.device.kind == "cpu" and problem.dtype == layer.dtype
    assert len(problem.taps) > 0 and str(problem.facing(Direction.FORWARD).taps) == layer.taps.partition("~")[0]
    assert str(layer.problem().taps) == layer.taps  # canonical text
    assert layer.c_in % layer.groups == 0 and layer.c_out % layer.groups == 0
    steps = zip(layer.spatial, layer.stride, strict=True)
    assert problem.out_spatial == tuple(-(-extent // step) for extent, step in steps)  # 'same', causal, or patches
    assert problem.taps.live(layer.spatial, layer.padding, layer.stride)


def test_suites_have_unique_names_and_share_geometry() -> None:
    assert {"cpu", "quick", "gpu"} <= set(SUITES)
    for name, suite in SUITES.items():
        assert len({layer.name for layer in suite}) == len(suite), name
    assert set(SUITES["quick"]) < set(SUITES["cpu"]) and 8 <= len(SUITES["quick"]) <= 12
    for small, full in zip(SUITES["cpu"], SUITES["gpu"], strict=True):
        assert (small.name, small.taps, small.spatial) == (full.name, full.taps, full.spatial)
        assert (small.stride, small.padding) == (full.stride, full.padding)
        assert small.problem().flops <= full.problem().flops
        assert (small.dtype, full.dtype) == ("float32", "bfloat16")


def test_scattered_taps_are_the_same_everywhere() -> None:
    layer = next(layer for layer in SUITES["cpu"] if layer.name == "dcls-s1-34of17")
    taps = TapPattern.parse(layer.taps)
    assert taps.window == (17, 17) and len(taps) == 34
    assert taps.offsets[:4] == ((1, 8), (2, 1), (2, 6), (3, 1))  # records name these taps
