"""Bands along the last axis but one without exchanging axes: what ``multiply_upright`` is launched with."""

from __future__ import annotations

import torch
from torch import Tensor

from adaptconv.backends.base import Config
from adaptconv.backends.triton.banded.passes import bands, precision, rows_of
from adaptconv.backends.triton.banded.positions import HALF, positions
from adaptconv.backends.triton.banded.tiling import STEP_BYTES, Window, columns_of, cut, tile_of, warps_of
from adaptconv.backends.triton.banded.upright_kernels import multiply_upright
from adaptconv.problem import Direction, Problem


def product(
    here: Problem, problem: Problem, config: Config, win: Window, x: Tensor, w: Tensor, bias: Tensor | None
) -> Tensor:
    """The convolution ``here`` of half-precision ``x`` on two axes, at stride 1 along the last."""
    many, _, wide = tile_of(config)
    made = cut(win, 1, wide)
    line = positions(win, made)
    x, _, width_halves = rows_of(x, False, (HALF,))
    table = bands(win, made, w, problem.direction is Direction.GRAD_INPUT)
    y = torch.empty((here.batch, here.c_out, *here.output_shape[2:]), dtype=x.dtype, device=x.device)
    halves = here.batch * line.image_halves
    tiles = -(-halves // line.kept(many))
    multiply_upright[(tiles * made.blocks_w * here.c_out,)](
        x, table, y, bias, halves, line.image_halves, here.c_out, win.size[2], width_halves, win.out[2], win.out[1],
        tiles, made.blocks_w, wide, made.step_units, made.before_units, made.units, made.table_rows, made.table_grains,
        win.stride[2], made.shift, line.late, line.first_half, line.step_half, line.even_columns, line.odd_half,
        line.odd_columns, UNIT=win.unit, BI=columns_of(config), BN=many, BK=STEP_BYTES // x.element_size(),
        ODD=line.odd_columns > 0, WHOLE=win.size[2] % win.unit == 0, HAS_BIAS=bias is not None,
        PRECISION=precision(problem), num_warps=warps_of(config), num_stages=int(config["stages"]),
    )  # fmt: skip
    return y
