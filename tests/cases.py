"""Named convolution problems that every backend must agree on, kept small: the oracle walks them tap by tap."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from adaptconv.backends import BACKENDS
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.precision import fp32_precision
from adaptconv.problem import Device, Direction, Padding, Problem
from adaptconv.taps import TapPattern

CPU = torch.device("cpu")
ON_CPU = tuple(backend for backend in BACKENDS if not isinstance(backend, TritonBackend))
"""The backends that run on any machine; those of Triton have tests of their own in ``tests/triton``."""


@dataclass(frozen=True, slots=True)
class Case:
    """One convolution over an input ``[batch, c_in, *spatial]``.

    Attributes:
        name: unique; says what is special about it.
        batch, c_in, c_out, groups, spatial: sizes.
        taps: text of a ``TapPattern``.
        stride: output step an axis.
        padding: zeros (before, after) an axis.
        bias: whether the forward pass adds one.
    """

    name: str
    batch: int
    c_in: int
    c_out: int
    groups: int
    spatial: tuple[int, ...]
    taps: str
    stride: tuple[int, ...]
    padding: Padding
    bias: bool = False

    def problem(self, direction: Direction, dtype: torch.dtype = torch.float64, layout: str = "contiguous") -> Problem:
        return Problem(
            direction, self.batch, self.c_in, self.c_out, self.groups, self.spatial, TapPattern.parse(self.taps),
            self.stride, self.padding, str(dtype).removeprefix("torch."), layout, Device.of(CPU),
            self.bias and direction is Direction.FORWARD, fp32_precision(dtype, CPU),
        )  # fmt: skip


def case(
    name: str,
    taps: str,
    spatial: tuple[int, ...],
    *,
    channels: tuple[int, int] = (4, 6),
    groups: int = 1,
    batch: int = 2,
    stride: int | tuple[int, ...] = 1,
    pad: int | tuple[int | tuple[int, int], ...] = 0,
    bias: bool = False,
) -> Case:
    axes = len(spatial)
    strides = (stride,) * axes if isinstance(stride, int) else stride
    pads = (pad,) * axes if isinstance(pad, int) else pad
    pairs = tuple(p if isinstance(p, tuple) else (p, p) for p in pads)
    return Case(name, batch, *channels, groups, spatial, taps, strides, pairs, bias)


DUAL_1D = "101010101111101010101"  # an island of 5 with wings of dilation 2
RING = "111/101/111"
SCATTERED = "1000100/0010000/0000001/0100010/1000000/0001000/0010001"

CASES = (
    # ---- 1-D
    case("1d-plain", "3", (11,), pad=1, bias=True),
    case("1d-even-kernel", "4", (12,), pad=((1, 2),)),
    case("1d-dilated", "3d4", (19,), pad=4),
    case("1d-dilated-strided", "5d3", (23,), stride=2, pad=6, bias=True),
    case("1d-partial-depthwise", DUAL_1D, (33,), channels=(4, 4), groups=4, pad=10, bias=True),
    case("1d-partial-strided", DUAL_1D, (30,), channels=(4, 8), groups=2, stride=3, pad=((9, 4),)),
    case("1d-single-tap-off-centre", "00001000", (17,), pad=((3, 1),)),
    case("1d-no-taps", "00000", (9,), pad=2, bias=True),
    case("1d-empty-border", "0001010100", (15,), pad=4),
    case("1d-padding-over-window", "3", (6,), stride=2, pad=7),
    case("1d-dead-taps", "3d9", (7,), pad=9),
    case("1d-one-sample", "3", (1,), batch=1, channels=(3, 5), pad=1),
    case("1d-large-k31", "31", (40,), channels=(4, 4), groups=4, pad=15),
    case("1d-multiplier", "3d2", (14,), channels=(3, 6), groups=3, pad=2),
    case("1d-pointwise", "1d1", (13,), channels=(5, 7), bias=True),
    case("1d-pointwise-strided", "1d1", (13,), channels=(5, 7), stride=4),
    # ---- 2-D
    case("2d-plain", "3x3", (8, 9), pad=1, bias=True),
    case("2d-pointwise", "1x1", (6, 5), channels=(5, 7), batch=3, bias=True),
    case("2d-one-to-one-map", "1x1", (1, 1), channels=(7, 5)),
    case("2d-kernel-on-one-pixel", "3x3", (1, 1), batch=1, channels=(3, 5), pad=1, bias=True),
    case("2d-even-kernel-asymmetric", "2x4", (7, 8), pad=((0, 1), (1, 2))),
    case("2d-strided", "3x3", (11, 10), stride=2, pad=1),
    case("2d-mixed-strides", "3x5", (13, 12), stride=(3, 2), pad=((2, 0), (1, 3)), bias=True),
    case("2d-stride-over-kernel", "2x2", (13, 13), stride=3),
    case("2d-dilated", "3x3d2x3", (11, 14), pad=(2, 3)),
    case("2d-dilated-one-axis", "3x3d1x4", (7, 15), stride=(2, 1), pad=(1, 4)),
    case("2d-dilation-over-map", "3x3d12x12", (8, 8), channels=(3, 4), pad=12, bias=True),
    case("2d-grouped", "3x3", (9, 8), channels=(6, 9), groups=3, pad=1, bias=True),
    case("2d-grouped-dilated-strided", "3x3d2x2", (12, 11), channels=(8, 4), groups=2, stride=2, pad=2),
    case("2d-depthwise", "5x5", (12, 11), channels=(8, 8), groups=8, pad=2, bias=True),
    case("2d-depthwise-dilated", "3x3d3x3", (14, 13), channels=(5, 5), groups=5, pad=3),
    case("2d-depthwise-strided", "3x3", (11, 12), channels=(8, 8), groups=8, stride=2, pad=1),
    case("2d-depthwise-strided-dilated", "3x3d2x3", (13, 15), channels=(4, 4), groups=4, stride=(2, 3), pad=(3, 1)),
    case("2d-multiplier", "3x3", (9, 9), channels=(4, 8), groups=4, pad=1, bias=True),
    case("2d-multiplier-strided", "3x3d2x1", (10, 9), channels=(3, 6), groups=3, stride=2, pad=(2, 1)),
    case("2d-depthwise-large-k17", "17x17", (18, 19), batch=1, channels=(4, 4), groups=4, pad=8),
    case("2d-depthwise-holes-of-each", "7x7~0.25", (12, 11), channels=(4, 4), groups=4, pad=3),
    case("2d-depthwise-51x5", "51x5", (30, 9), batch=1, channels=(2, 2), groups=2, pad=(25, 2)),
    case("2d-odd-channels", "3x3", (7, 7), batch=1, channels=(3, 7), pad=1),
    case("2d-one-channel", "3x3", (6, 6), channels=(1, 1), pad=1),
    case("2d-cross", "010/111/010", (8, 7), pad=1, bias=True),
    case("2d-ring", RING, (9, 8), channels=(6, 6), groups=2, pad=1),
    case("2d-ring-strided", RING, (9, 8), channels=(6, 6), groups=6, stride=2, pad=((1, 0), (0, 1))),
    case("2d-corners", "10001/00000/00000/00000/10001", (9, 10), pad=2),
    case("2d-centre-only", "00000/00000/00100/00000/00000", (7, 8), channels=(4, 4), groups=4, pad=2, bias=True),
    case("2d-single-tap-in-corner", "100/000/000", (7, 8), pad=((1, 0), (0, 2))),
    case("2d-empty-border", "00000/01100/01100/00000/00000", (8, 8), pad=1),
    case("2d-empty-border-strided", "0000000/0010100/0000000/0010100/0000000", (9, 12), stride=2, pad=(1, 2)),
    case("2d-no-taps", "000/000", (6, 7), pad=1, bias=True),
    case("2d-cropped-past-the-input", "000/000/000/001", (2, 3), channels=(2, 2), pad=((0, 2), (0, 1))),
    case("2d-scattered", SCATTERED, (11, 12), channels=(4, 4), pad=3),
    case("2d-three-grids", "1110001/1110000/1110001", (9, 12), pad=(1, 3)),
    case("2d-padding-over-window", "3x3", (4, 5), channels=(4, 4), groups=4, pad=5),
    # ---- spread by a footprint
    case("1d-interpolated", "3d2*0.5,1,0.5", (17,), pad=3, bias=True),
    case("1d-interpolated-strided", "3d4*0.25,0.5,0.75,1,0.75,0.5,0.25", (31,), stride=2, pad=((7, 3),)),
    case("2d-interpolated-7x7", "3x3d2x2*0.5,1,0.5x0.5,1,0.5", (11, 12), pad=3, bias=True),
    case("2d-interpolated-15x15", "3x3d4x4*0.25,0.5,0.75,1,0.75,0.5,0.25x0.25,0.5,0.75,1,0.75,0.5,0.25", (16, 17),
         channels=(4, 4), pad=7),
    case("2d-interpolated-strided", "3x3d2x2*0.5,1,0.5x0.5,1,0.5", (13, 12), channels=(4, 6), groups=2, stride=(2, 3),
         pad=(3, 1)),
    case("2d-interpolated-depthwise", "3x2d2x2*0.5,1,0.5x1,0.5", (11, 10), channels=(6, 6), groups=6, pad=(3, 2)),
    case("2d-interpolated-lopsided", "2x2*1,-0.5x0.25,1,2", (9, 8), pad=((0, 2), (5, 1)), bias=True),
    case("2d-spread-cross", "010/111/010*0.5,1,0.5x0.5,1,0.5", (9, 9), pad=2),
    case("3d-interpolated", "3x3x3d2x2x2*0.5,1,0.5x0.5,1,0.5x0.5,1,0.5", (7, 8, 7), channels=(3, 2), pad=3, batch=1),
    # ---- 3-D
    case("3d-single-volume", "3x3x3d2x1x2", (6, 5, 7), channels=(4, 6), batch=1, pad=(2, 1, 2), bias=True),
    case("3d-plain", "3x3x3", (5, 6, 4), channels=(3, 5), pad=1, bias=True),
    case("3d-batch-one", "2x3x1", (5, 6, 4), batch=1, channels=(3, 4), pad=((0, 1), (1, 1), (0, 0))),
    case("3d-dilated-strided", "3x2x3d2x1x2", (8, 7, 9), channels=(4, 2), groups=2, stride=(2, 1, 3), pad=(2, 1, 0)),
    case("3d-depthwise", "3x3x3", (5, 5, 6), channels=(4, 4), groups=4, pad=1, bias=True),
    case("3d-cross", "000/010/000//010/111/010//000/010/000", (5, 6, 5), channels=(3, 3), pad=1),
    case("3d-cross-strided", "000/010/000//010/111/010//000/010/000", (5, 7, 6), channels=(4, 4), groups=4, stride=2,
         pad=((1, 0), (1, 2), (0, 1))),
    case("3d-corners", "101/000/101//000/000/000//101/000/101", (4, 5, 6), channels=(3, 2), stride=(1, 2, 1), pad=1),
    case("3d-one-voxel", "3x3x3d2x2x2", (1, 1, 1), batch=1, channels=(3, 3), pad=2),
    # ---- channels enough for a matrix product
    case("2d-wide-dilated", "3x3d2x3", (7, 8), channels=(16, 24), batch=1, pad=(2, 3), bias=True),
    case("2d-wide-grouped-strided", "2x2", (7, 8), channels=(18, 22), groups=2, stride=2, pad=1),
    case("1d-wide-dilated-by-8", "3d8", (24,), channels=(8, 16), pad=8, bias=True),
    case("3d-wide-temporal", "3x1x1", (4, 3, 2), channels=(8, 12), pad=(1, 0, 0)),
)  # fmt: skip
