"""Pictures of kernels: where taps sit in their window, and how strong they are."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.taps import TapPattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from adaptconv.kernel import Kernel

_EMPTY, _LINE, _CENTRE = "#f0f0f0", "white", "#ff7f0e"
_FAINT = 0.2  # where the scale of blues starts: the faintest tap still differs from an empty position


def plot(what: Any, ax: Axes | None = None, *, title: str | None = None) -> Axes:
    """Draw taps in their window.

    A ``TapPattern`` (or a bound kernel family) shows its taps, each spread by its footprint; a ``Kernel`` (or a
    layer) shows at every position of the window the root mean square of its weights over channels. A family that
    constructs its kernel, say from learnable positions, shows one channel, freshly initialised. One axis is drawn as
    stems, two as cells, three as planes along the first axis, in reading order. Positions are counted from the
    window's centre, which is marked; where nothing sits, cells are grey.

    Args:
        what: a ``TapPattern``, a ``Kernel``, or something that has one: a bound family, a layer.
        ax: matplotlib axes to draw on; by default those of a new figure, with a colour scale.
        title: a title to set.

    Returns:
        The matplotlib axes; ``.figure`` is the figure.

    Raises:
        ImportError: matplotlib is missing.
        ConvTypeError: something without taps.
        ConvArgumentError: weights without values (on the meta device).
    """
    values = values_of(what)
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install adaptconv[plot]") from error
    own = ax is None
    if ax is None:
        planes = values.shape[0] if values.dim() == 3 else 1
        ax = plt.subplots(figsize=_inches(values, planes), layout="constrained")[1]
    if values.dim() == 1:
        _stems(ax, values)
    else:
        image = _cells(ax, values)
        if own and len(values[values != 0].unique()) > 1:
            ax.figure.colorbar(image, ax=ax, shrink=0.8)
    if title is not None:
        ax.set_title(title)
    return ax


def values_of(what: Any) -> Tensor:
    """What ``plot`` shows, as a float64 tensor of the window's shape on the CPU.

    Raises:
        ConvTypeError: something without taps.
        ConvArgumentError: weights without values (on the meta device).
    """
    if not _is_kernel(what) and not isinstance(what, TapPattern):
        held = getattr(what, "kernel", None)
        if _is_kernel(held):
            what = held
        else:
            what = _example(what) if getattr(what, "constructed", False) else getattr(what, "taps", what)
    if isinstance(what, TapPattern):
        plain, entries = what.spread()
        values = torch.zeros(plain.window, dtype=torch.float64)
        for _, place, value in entries:
            values[plain.offsets[place]] += value
        return values
    if not _is_kernel(what):
        raise ConvTypeError(
            f"a plot needs a TapPattern, a Kernel, a bound kernel family or a layer, got {type(what).__name__}"
        )
    if what.weight.is_meta:
        raise ConvArgumentError("this kernel has no values to draw: its weight is on the meta device")
    dense: Tensor = replace(what, weight=what.weight.detach().to("cpu", torch.float64)).dense()
    return dense.square().mean((0, 1)).sqrt()


def _is_kernel(what: Any) -> bool:
    """Whether this is a ``Kernel``, which is not imported here so that it may have a ``plot`` of its own."""
    return isinstance(getattr(what, "weight", None), Tensor) and callable(getattr(what, "dense", None))


def _example(family: Any) -> Kernel:
    """A kernel of one channel as a bound family initialises it; nobody else's random numbers are used up."""
    slots = family.slots(1, 1)
    tensors = {slot.name: torch.zeros(slot.shape, dtype=slot.dtype or torch.float32, device="cpu") for slot in slots}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        family.reset(tensors)
        kernel: Kernel = family.kernel(*tensors.values())
    return kernel


def _inches(values: Tensor, planes: int) -> tuple[float, float]:
    """A figure in which a cell is about a third of an inch, neither tiny nor larger than a page."""
    if values.dim() == 1:
        return min(max(0.25 * len(values) + 1.5, 4.0), 12.0), 2.4
    height, width = values.shape[-2:]
    columns = _columns(planes)
    rows = math.ceil(planes / columns)
    return min(max(0.33 * columns * (width + 1) + 1, 3), 12), min(max(0.33 * rows * (height + 1) + 1, 3), 12)


def _columns(planes: int) -> int:
    return planes if planes <= 5 else math.ceil(math.sqrt(planes))


def _counted(extent: int) -> list[float]:
    """Positions counted from the window's centre."""
    return [i - (extent - 1) / 2 for i in range(extent)]


def _stems(ax: Axes, values: Tensor) -> None:
    from matplotlib.ticker import MaxNLocator

    places, heights = _counted(len(values)), values.tolist()
    taps = [(place, height) for place, height in zip(places, heights, strict=True) if height]
    ax.axhline(0, color="0.6", linewidth=0.8, zorder=0)
    ax.plot(places, [0] * len(places), ".", color="0.6", markersize=3, zorder=1)
    ax.vlines([place for place, _ in taps], 0, [height for _, height in taps], color="C0", linewidth=1.5)
    ax.plot([place for place, _ in taps], [height for _, height in taps], "o", color="C0", markersize=4)
    ax.axvline(0, color=_CENTRE, linewidth=0.8, linestyle=":", zorder=0)
    ax.set_xlim(places[0] - 0.7, places[-1] + 0.7)
    top, bottom = max(0.0, *heights), min(0.0, *heights)
    margin = 0.15 * ((top - bottom) or 1.0)
    ax.set_ylim(bottom - (margin if bottom else margin / 2), top + margin)
    ax.xaxis.set_major_locator(MaxNLocator(integer=len(values) % 2 == 1))
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def _cells(ax: Axes, values: Tensor) -> Any:
    import matplotlib as mpl
    from matplotlib.colors import ListedColormap

    planes = values if values.dim() == 3 else values[None]
    depth, height, width = planes.shape
    columns = _columns(depth)
    rows = math.ceil(depth / columns)
    canvas = torch.full((rows * (height + 1) - 1, columns * (width + 1) - 1), math.nan, dtype=values.dtype)
    corners = [(i // columns * (height + 1), i % columns * (width + 1)) for i in range(depth)]
    for plane, (top, left) in zip(planes, corners, strict=True):
        canvas[top : top + height, left : left + width] = plane
    empty = (canvas == 0).numpy()
    ax.imshow(empty, cmap=ListedColormap(["white", _EMPTY]), vmin=0, vmax=1, interpolation="nearest")
    strongest = float(values.abs().max()) or 1.0
    signed = bool((values < 0).any())
    shown = torch.where(canvas == 0, math.nan, canvas).numpy()
    blues = ListedColormap(mpl.colormaps["Blues"](torch.linspace(_FAINT, 1, 256).numpy()))
    image = ax.imshow(
        shown, cmap="RdBu" if signed else blues, vmin=-strongest if signed else 0, vmax=strongest,
        interpolation="nearest",
    )  # fmt: skip
    for number, (top, left) in enumerate(corners):
        lines: dict[str, Any] = {"color": _LINE, "linewidth": 1.0}
        ax.hlines([top + i - 0.5 for i in range(1, height)], left - 0.5, left + width - 0.5, **lines)
        ax.vlines([left + i - 0.5 for i in range(1, width)], top - 0.5, top + height - 0.5, **lines)
        if depth == 1 or 2 * number == depth - 1:
            ax.plot(
                left + (width - 1) / 2,
                top + (height - 1) / 2,
                "+",
                color=_CENTRE,
                markersize=8,
                markeredgewidth=1.8,
                zorder=3,
            )
        if depth > 1:
            place = f"{_counted(depth)[number]:+g}" if 2 * number != depth - 1 else "0"
            ax.text(left + (width - 1) / 2, top - 0.65, place, ha="center", va="bottom", fontsize="small")
    ax.set_aspect("equal")
    if depth == 1:
        for axis, extent in ((ax.xaxis, width), (ax.yaxis, height)):
            marks = sorted({0, (extent - 1) / 2, extent - 1})
            axis.set_ticks(marks, [f"{mark - (extent - 1) / 2:g}" for mark in marks])
    else:
        ax.set_ylim(len(canvas) - 0.5, -1.5)  # room for the upper planes' places, under a title
        ax.set_xticks([])
        ax.set_yticks([])
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set_visible(False)
    return image
