"""Interpolated kernels: few weights, spread over a wide window by a small filter."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adaptconv.arguments import check_extents, checked_padding
from adaptconv.errors import ConvArgumentError
from adaptconv.functional import convolution
from adaptconv.kernels import footprints
from adaptconv.kernels.base import Family, Ints, Slot, bound_of_uniform, per_axis
from adaptconv.kernels.footprints import Filter, Matrix, Stencil, filters_of, read_footprint, stencil_tensor
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern

_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@dataclass(frozen=True)
class _Form:
    """What the settings come to for a number of axes; plain values, so that a tracer finds constants.

    Attributes:
        taps: of the compact weight.
        filters: one filter an axis for a single round, or a stencil.
        whole: the same of all rounds together.
        matrices: an axis each, from the weights to the window's; empty where it is not computed so.
        white, smooth: energy that one weight becomes, on white and on smooth input; 1 for a plain kernel.
    """

    taps: TapPattern
    filters: tuple[Filter, ...] | Stencil
    whole: tuple[Filter, ...] | Stencil
    matrices: tuple[Matrix, ...]
    white: float
    smooth: float


@dataclass(frozen=True)
class Interpolated(Family):
    """A kernel of few weights, with interpolated values inserted between them.

    One round sets the weights two apart and spreads each by the footprint ``s``, along every axis::

        K[j] = sum_i w[i] s[j - 2 i]

    which is upsampling the kernel by a triangle filter, as bilinear interpolation does an image (equally: a transposed
    convolution of the kernel with stride 2). ``r`` rounds have the footprint ``s * up2(s) * ... * up_{2^(r-1)}(s)``
    and weights ``2^r`` apart. A 3x3 kernel becomes 7x7, then 15x15, its last values fading out beyond the outermost
    weights; with ``fade=False`` each round is cut off at the outermost weights: 5x5, then 9x9.

    The parameters are those of the plain kernel, ``weight [C_out, C_in/groups, *size]``: its checkpoints load.
    With ``fade`` and a fixed footprint of one filter an axis the taps are the grid of weights with that footprint,
    and no wide kernel is made: a convolution by ``K`` is a cheap smoothing by ``s`` of every channel, then the grid's.
    Without ``fade``, the wide kernel is made for each call (and kept between calls without gradients). A footprint
    over several axes that is no outer product is computed in the two steps if these multiply less, for each output
    ``C_in * prod(footprint) + C_out * C_in/groups * prod(size)`` against ``C_out * C_in/groups * prod(window)``, else
    on the wide kernel.

    Initialisation: independent weights of variance ``v``, on input of variance 1, give an output of variance
    ``v * C_in/groups * prod(size) * E``, where ``E = 1`` for a plain kernel. For an interpolated one, with ``s`` the
    footprint of all rounds over all axes, ``E = sum(s^2)`` on white input and ``E = sum(s)^2`` on input that hardly
    changes within the window. (Without ``fade``: of the linear map from weights to window, the sum of its squares,
    or of the squares of its rows' sums, over ``prod(size)``.) ``rescale`` starts the weights as torch starts those of a
    plain kernel of ``size``, times ``E^-0.5``, so that both outputs have the same variance. For the linear footprint
    in 2-D with ``fade`` that is 1/1.5 (one round) or 1/2.75 (two) for white input, 1/4 or 1/16 for smooth input.
    Images, and what such a kernel makes of them, are closer to smooth than to white.

    Args:
        size: weights along each axis, odd or even.
        rounds: how often values are inserted; 0 is the plain kernel.
        fade: let the outermost weights fade out beyond themselves, by the whole footprint.
        footprint: ``"linear"``, which is ``(0.5, 1, 0.5)`` along each axis; or one filter for all axes; or one filter
            an axis; or values over all axes as a tensor, array or ``Stencil``. Odd lengths, taken as they are: nothing
            is normalised. ``(1,)`` inserts zeros: a dilated kernel.
        learn_footprint: make the filters a parameter ``footprint [axes, L]``, shared by all rounds and channels,
            which starts as given. With ``fade`` the convolution is then computed in the two steps.
        rescale: correct the initial variance for ``"white"`` input (what True means) or for ``"smooth"`` input; False
            starts the weights as those of a plain kernel.

    Raises:
        ConvArgumentError: settings out of their range; when bound, a footprint that does not fit the axes.
    """

    size: Ints
    rounds: int = 1
    fade: bool = True
    footprint: str | Sequence[Any] | Tensor | Stencil = "linear"
    learn_footprint: bool = False
    rescale: bool | str = True  # or "white", "smooth"

    identity: bool = field(init=False, repr=False, compare=False, default=False)
    constructed: bool = field(init=False, repr=False, compare=False, default=False)
    factorised: bool = field(init=False, repr=False, compare=False, default=False)
    _form: _Form | None = field(init=False, repr=False, compare=False, default=None)

    def __post_init__(self) -> None:
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 0:
            raise ConvArgumentError(f"rounds must be an int of at least 0, got {self.rounds!r}")
        if self.learn_footprint and not self.rounds:
            raise ConvArgumentError("learn_footprint needs at least one round: no round, no footprint to learn")
        if self.rescale not in (True, False, "white", "smooth"):
            raise ConvArgumentError(f"rescale must be True or 'white', 'smooth', or False; got {self.rescale!r}")
        if isinstance(self.size, list):
            object.__setattr__(self, "size", tuple(self.size))
        footprint = read_footprint(self.footprint)
        object.__setattr__(self, "footprint", self.footprint if isinstance(self.footprint, str) else footprint)

    def bound(self, axes: int) -> Interpolated:
        """Size an axis, and everything that follows from the settings."""
        if self._form is not None and self._form.taps.axes == axes:
            return self
        size = per_axis(self.size, axes, "size")
        filters = filters_of(read_footprint(self.footprint), axes)
        if self.learn_footprint and (isinstance(filters, Stencil) or len({len(f) for f in filters}) > 1):
            raise ConvArgumentError(
                f"learn_footprint needs one filter an axis, all of one length; got {self.footprint!r}: "
                f"give filters, the shorter ones filled up with zeros"
            )
        mine = Interpolated(size, self.rounds, self.fade, self.footprint, self.learn_footprint, self.rescale)
        form = _form(size, self.rounds, self.fade, filters, self.learn_footprint)
        _check_energy(form, self.rescale)
        fixed = not self.learn_footprint and not isinstance(filters, Stencil)
        identity = self.rounds == 0 or (fixed and self.fade)
        kind = "identity" if identity else "factorised" if self.fade else "constructed"
        object.__setattr__(mine, kind, True)
        object.__setattr__(mine, "_form", form)
        return mine

    @property
    def _bound(self) -> _Form:
        if self._form is None:
            raise ConvArgumentError(f"{self!r} is not bound yet: bound(axes) says for how many axes")
        return self._form

    @property
    def _gain(self) -> float:
        """What the initial weights are scaled by."""
        if not self.rescale:
            return 1.0
        return 1 / math.sqrt(self._bound.smooth if self.rescale == "smooth" else self._bound.white)

    @property
    def taps(self) -> TapPattern:
        """The grid of weights, spread by the footprint; or every position of the window."""
        return self._bound.taps

    def slots(self, c_out: int, c_in: int) -> tuple[Slot, ...]:
        """A weight of torch's shape, and the footprint where it is learnt."""
        size = per_axis(self.size, self.taps.axes, "size")
        weight = Slot("weight", (c_out, c_in, *size))
        if not self.learn_footprint:
            return (weight,)
        filters = self._bound.filters
        return (weight, Slot("footprint", (len(size), len(filters[0]))))  # type: ignore[index]

    def fan_in(self, c_in: int) -> int:
        """Those of the plain kernel."""
        return c_in * math.prod(per_axis(self.size, self.taps.axes, "size"))

    def reset(self, tensors: Mapping[str, Tensor]) -> None:
        """Torch's initialisation of the plain kernel, scaled; the footprint as given."""
        weight = tensors["weight"]
        bound_of_uniform(weight, weight[0].numel(), self._gain)
        if self.learn_footprint:
            values = torch.tensor(self._bound.filters, dtype=torch.float64)
            tensors["footprint"].copy_(values)

    def compact(self, *tensors: Tensor) -> Tensor:
        """The weight on the taps: itself, or the wide kernel ``[C_out, C_in/groups, prod(window)]``."""
        weight = tensors[0]
        if self.identity:
            return weight.flatten(2)
        form = self._bound
        if isinstance(form.filters, Stencil):
            return self._widened(weight)
        if not self.learn_footprint:
            return weight.flatten(2) @ footprints.joint_matrix(form.matrices, weight)
        product = None
        for values, size in zip(tensors[1].unbind(), weight.shape[2:], strict=True):
            matrix = footprints.learnt_matrix(values, size, self.rounds, self.fade)
            product = matrix if product is None else torch.kron(product, matrix)
        assert product is not None
        return weight.flatten(2) @ product

    def _widened(self, weight: Tensor) -> Tensor:
        """The wide kernel by a stencil: a transposed convolution of the kernel."""
        form = self._bound
        axes = form.taps.axes
        one, whole = form.filters, form.whole
        assert isinstance(one, Stencil) and isinstance(whole, Stencil)
        wide = weight.reshape(-1, 1, *weight.shape[2:])
        widen = _TRANSPOSED[axes]
        if self.fade:
            wide = widen(wide, stencil_tensor(whole, weight)[None, None], stride=2**self.rounds)
        else:
            half = tuple(extent // 2 for extent in one.shape)
            for _ in range(self.rounds):
                wide = widen(wide, stencil_tensor(one, weight)[None, None], stride=2, padding=half)
        return wide.reshape(*weight.shape[:2], -1)

    def convolve(
        self,
        x: Tensor,
        bias: Tensor | None,
        tensors: Sequence[Tensor],
        stride: tuple[int, ...],
        padding: Any,
        groups: int,
    ) -> Tensor:
        """Smooth every channel by the footprint, then convolve by the grid of weights: exactly the wide kernel."""
        taps, axes, weight = self.taps, self.taps.axes, tensors[0]
        pads: Any = checked_padding(axes, padding, taps.window, stride)
        if not torch.compiler.is_dynamo_compiling() and isinstance(x, Tensor) and x.dim() in (axes + 1, axes + 2):
            check_extents(axes, x if x.dim() == axes + 2 else x.unsqueeze(0), taps, pads)
        if not self.learn_footprint and not self._in_steps(weight.shape[0] // groups):
            with torch.autocast(weight.device.type, enabled=False):
                wide = self.compact(*tensors).reshape(*weight.shape[:2], *taps.window)
            return convolution(axes, x, wide, bias, stride, pads, 1, groups)
        for smoother, zeros in self._smoothers(tensors, pads):
            channels = weight.shape[1] * groups
            x = convolution(axes, x, smoother.expand(channels, 1, *smoother.shape), None, 1, zeros, 1, channels)
        return convolution(axes, x, weight, bias, stride, 0, 2**self.rounds, groups)

    def _in_steps(self, outputs: int) -> bool:
        """Whether two steps need fewer multiplications, for so many output channels an input channel."""
        whole = self._bound.whole
        assert isinstance(whole, Stencil)
        weights = math.prod(per_axis(self.size, self.taps.axes, "size"))
        return len(whole.values) + outputs * weights < outputs * self.taps.window_taps

    def _smoothers(self, tensors: Sequence[Tensor], pads: Padding) -> list[tuple[Tensor, Any]]:
        """The filters to smooth by, one after the other, with the padding of each.

        One over all axes while it is small; else one an axis, which reads the input once an axis but multiplies less.
        """
        whole = self._bound.whole
        if isinstance(whole, Stencil):
            return [(stencil_tensor(whole, tensors[0]), pads)]
        filters = footprints.learnt_rounds(tensors[1], self.rounds)
        axes, length = filters.shape
        shapes = [tuple(length if a == axis else 1 for a in range(axes)) for axis in range(axes)]
        each = [f.reshape(shape) for f, shape in zip(filters.unbind(), shapes, strict=True)]
        if length**axes <= 2 * axes * length:
            return [(reduce(operator.mul, each), pads)]
        return [(f, tuple(p if a == axis else (0, 0) for a, p in enumerate(pads))) for axis, f in enumerate(each)]


def _form(
    size: tuple[int, ...], rounds: int, fade: bool, filters: tuple[Filter, ...] | Stencil, learnt: bool
) -> _Form:  # fmt: skip
    """Everything that follows from bound settings."""
    step = 2**rounds
    grid = TapPattern.grid(size, step)
    if isinstance(filters, Stencil):
        if not rounds:
            return _Form(grid, filters, filters, (), 1.0, 1.0)
        whole = filters.rounds(rounds)
        window = tuple((n - 1) * step + (extent if fade else 1) for n, extent in zip(size, whole.shape, strict=True))
        if fade:
            return _Form(TapPattern.grid(window), filters, whole, (), *whole.energies())
        return _Form(TapPattern.grid(window), filters, whole, (), *footprints.cut_energies(filters, size, rounds))
    each = tuple(footprints.combined(f, rounds) for f in filters)
    if fade:
        spread = grid.spread_by(each)
        taps = TapPattern.grid(spread.window) if learnt else spread
        rows: list[Matrix] = [(f,) for f in each]
    else:
        rows = [footprints.cut_matrix(f, n, rounds) for f, n in zip(filters, size, strict=True)]
        taps = TapPattern.grid(tuple(len(m[0]) for m in rows))
    white = math.prod(sum(v * v for row in m for v in row) / len(m) for m in rows)
    smooth = math.prod(sum(sum(row) * sum(row) for row in m) / len(m) for m in rows)
    return _Form(taps, filters, each, () if fade else tuple(rows), white, smooth)


def _check_energy(form: _Form, rescale: bool | str) -> None:
    if not 0 < form.white < math.inf:
        raise ConvArgumentError(
            f"this footprint makes one weight a kernel whose squares sum up to {form.white}: nothing can be convolved "
            f"with it; give values of ordinary size, and some within the outermost weights where fade is False"
        )
    if rescale == "smooth" and form.smooth < 1e-12 * form.white:
        raise ConvArgumentError(
            "this footprint sums up to zero, so smooth input has no variance to keep: rescale='white'"
        )
