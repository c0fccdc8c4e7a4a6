"""Pictures of kernels show the right values in the right places."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adaptconv import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, Kernel, TapPattern
from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.kernels import FixedTaps, Grid
from adaptconv.kernels.spacing import LearnableSpacing
from adaptconv.plots import plot, values_of

mpl = pytest.importorskip("matplotlib")
mpl.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    plt.close("all")


def cells(ax: Any) -> np.ndarray[Any, Any]:
    """What is drawn: 0 for an empty position, NaN for none."""
    empty, shown = (np.ma.filled(image.get_array().astype(float), np.nan) for image in ax.images)
    return np.where(empty == 1, 0.0, shown)


# ---- what is shown ----------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [(1, 1), (3, 2)])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_values_are_the_root_mean_square_over_channels(axes: int, channels: tuple[int, int]) -> None:
    taps = TapPattern.parse(["1011", "101/010", "101/010//000/111"][axes - 1])
    kernel = Kernel(torch.randn(*channels, len(taps), dtype=torch.float64, requires_grad=True), taps)
    values = values_of(kernel)
    expected = kernel.dense().detach().numpy()
    np.testing.assert_allclose(values.numpy(), np.sqrt((expected**2).mean((0, 1))))
    assert not values.requires_grad


def test_values_of_a_layer_of_a_family_and_of_a_spread_pattern() -> None:
    layer = AdaptiveConv2d(2, 4, 3, dilation=2).to(torch.bfloat16)
    assert torch.equal(values_of(layer), values_of(layer.kernel))
    assert values_of(layer).shape == (5, 5) and values_of(layer).dtype is torch.float64
    assert torch.equal(values_of(Grid(3, 2).bound(2)), values_of(TapPattern.grid((3, 3), 2)))
    assert values_of(FixedTaps.of("10101")).tolist() == [1, 0, 1, 0, 1]
    spread = TapPattern.grid(2, 2, axes=1).spread_by(((0.5, 1.0, 0.5),))
    assert values_of(spread).tolist() == [0.5, 1.0, 1.0, 1.0, 0.5]
    signed = TapPattern.grid(1, axes=1).spread_by(((-0.25, 1.0, -0.25),))
    assert values_of(signed).tolist() == [-0.25, 1.0, -0.25]


def test_a_constructed_family_shows_one_fresh_channel_and_leaves_random_numbers_alone() -> None:
    family = LearnableSpacing(4, 9, "v1").bound(2)
    state = torch.get_rng_state()
    values = values_of(family)
    assert torch.equal(torch.get_rng_state(), state)
    assert values.shape == (9, 9)
    assert 0 < int((values != 0).sum()) <= 4 * 4
    torch.manual_seed(int(torch.initial_seed()))
    torch.testing.assert_close(values, values_of(AdaptiveConv2d(1, 1, family, bias=False)))


# ---- how it is drawn --------------------------------------------------------------------------------


def test_two_axes_are_cells() -> None:
    kernel = AdaptiveConv2d(3, 2, taps="101/010/001/100").kernel
    ax = plot(kernel, title="a kernel")
    np.testing.assert_allclose(cells(ax), values_of(kernel).numpy())
    assert ax.get_title() == "a kernel" and ax.get_aspect() == 1.0
    (centre,) = [line for line in ax.lines if line.get_marker() == "+"]
    assert (list(centre.get_xdata()), list(centre.get_ydata())) == ([1.0], [1.5])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["-1", "0", "1"]
    assert [text.get_text() for text in ax.get_yticklabels()] == ["-1.5", "0", "1.5"]
    assert len(ax.figure.axes) == 2  # a scale beside it
    assert len(plot(TapPattern.grid((3, 3))).figure.axes) == 1  # all values alike: none


def test_one_axis_is_stems() -> None:
    layer = AdaptiveConv1d(2, 2, taps="1001101")
    values = values_of(layer)
    ax = plot(layer)
    (heads,) = [line for line in ax.lines if line.get_marker() == "o"]
    assert list(heads.get_xdata()) == [-3, 0, 1, 3]
    np.testing.assert_allclose(heads.get_ydata(), values[values != 0].numpy())
    (ground,) = [line for line in ax.lines if line.get_marker() == "."]
    assert list(ground.get_xdata()) == [-3, -2, -1, 0, 1, 2, 3]
    signed = plot(TapPattern.grid(1, axes=1).spread_by(((-0.25, 1.0, -0.25),)))
    assert signed.get_ylim()[0] < -0.25 and signed.get_ylim()[1] > 1


@pytest.mark.parametrize(("depth", "columns"), [(2, 2), (3, 3), (5, 5), (7, 3)])
def test_three_axes_are_planes_side_by_side(depth: int, columns: int) -> None:
    layer = AdaptiveConv3d(1, 1, (depth, 2, 3))
    values = values_of(layer).numpy()
    ax = plot(layer)
    drawn = cells(ax)
    for i in range(depth):
        top, left = i // columns * 3, i % columns * 4
        np.testing.assert_allclose(drawn[top : top + 2, left : left + 3], values[i])
    assert int(np.isfinite(drawn).sum()) == depth * 2 * 3  # and nothing between them
    marks = [text.get_text() for text in ax.texts]
    assert marks[0] == f"{-(depth - 1) / 2:+g}" and len(marks) == depth
    centres = [line for line in ax.lines if line.get_marker() == "+"]
    assert len(centres) == depth % 2


def test_given_axes_are_drawn_on_and_no_others() -> None:
    figure, (left, right) = plt.subplots(1, 2)
    assert plot(AdaptiveConv2d(1, 1, 3), left) is left
    assert plot(TapPattern.parse("101"), right) is right
    assert figure.axes == [left, right] and len(plt.get_fignums()) == 1
    figure.canvas.draw()


def test_the_colour_scale_tells_signs_apart() -> None:
    ax = plot(TapPattern.grid((1, 1)).spread_by(((-0.5, 1.0, -0.5), (1.0,))))
    assert ax.images[1].get_clim() == (-1.0, 1.0)
    assert plot(TapPattern.grid((2, 2))).images[1].get_clim() == (0.0, 1.0)


def test_a_kernel_of_zeros_is_all_empty() -> None:
    kernel = Kernel(torch.zeros(1, 1, 4), TapPattern.grid((2, 2)))
    ax = plot(kernel)
    assert not cells(ax).any()
    ax.figure.canvas.draw()


# ---- what is refused, and what is not needed --------------------------------------------------------


def test_what_has_no_taps_or_no_values_is_refused() -> None:
    for what in (nn.Linear(2, 2), torch.ones(3, 3), "101", None):
        with pytest.raises(ConvTypeError, match=f"a bound kernel family or a layer, got {type(what).__name__}"):
            plot(what)
    with pytest.raises(ConvArgumentError, match="no values to draw"):
        plot(AdaptiveConv2d(1, 1, 3, device="meta"))
    assert not plt.get_fignums()


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("matplotlib", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install adaptconv\[plot\]"):
        plot(TapPattern.grid(3))


def test_matplotlib_is_not_imported_before_a_plot() -> None:
    code = "import sys, adaptconv.plots; assert not any(name.startswith('matplotlib') for name in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
