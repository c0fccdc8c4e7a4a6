"""What people change about a layer that was tuned: the batch, the picture, the channels, the window."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from adaptconv.taps import TapPattern
from benchmarks.suites import Layer

_CHANNELS = 16  # from here on they may be halved


def changed(layer: Layer) -> Iterator[tuple[str, Layer]]:
    """Every change a layer allows, by name."""
    yield "batch x2", replace(layer, batch=2 * layer.batch)
    if layer.batch > 1:
        yield "batch /2", replace(layer, batch=layer.batch // 2)
    yield "map x3/4", replace(layer, spatial=tuple(max(3 * extent // 4, 1) for extent in layer.spatial))
    yield "map x4/3", replace(layer, spatial=tuple(4 * extent // 3 for extent in layer.spatial))
    if layer.c_in >= _CHANNELS and layer.groups in (1, layer.c_in):
        yield "channels /2", _times(layer, 1, 2)
    if layer.kind == "depthwise":
        yield "channels x3/2", _times(layer, 3, 2)
    for step in (2, 4):
        wider = _wider(layer, step)
        if wider is not None:
            yield f"window +{step}", wider


def _times(layer: Layer, factor: int, divisor: int) -> Layer:
    groups = 1 if layer.groups == 1 else layer.groups * factor // divisor
    c_in, c_out = layer.c_in * factor // divisor, layer.c_out * factor // divisor
    return replace(layer, c_in=c_in, c_out=c_out, groups=groups)


def _wider(layer: Layer, step: int) -> Layer | None:
    """A window of more taps along each axis, padded so that the output keeps its size; None where that is unusual."""
    grid = TapPattern.parse(layer.taps).single_grid()
    if grid is None or min(grid.size) < 3 or max(layer.stride) > 1 or not any(map(any, layer.padding)):
        return None
    taps = TapPattern.grid(tuple(size + step for size in grid.size), grid.dilation)
    padding = tuple(
        (before + (step * d if not after else step * d // 2), after + step * d // 2 if after else 0)
        for (before, after), d in zip(layer.padding, grid.dilation, strict=True)
    )
    return replace(layer, taps=str(taps), padding=padding)
