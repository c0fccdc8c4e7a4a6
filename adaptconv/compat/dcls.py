"""Drop-in for the ``dcls`` package (0.1.1): ``from adaptconv.compat.dcls import Dcls2d``.

The same classes, arguments, defaults, parameters and numbers, conventions at the window's border and for windows
that are not square included. New models are better off with ``adaptconv.kernels.LearnableSpacing``, where P[a] moves
along axis a, counted from that axis' own centre, and no element is ever lost. What differs between the two, for
P[r] a row of P and k[r] the window's size by number:

* P[r] is counted from ``k[r] // 2`` and clamped to ``+-(k[r] // 2)``, whichever axis it moves along: in v1, max and
  gauss the axes in reverse (2-D columns, rows; 3-D W, H, D), in v0 rows, columns and D, W, H;
* positions outside the window are not clamped in the forward pass: an element is then lost or renormalised, and in a
  window of even size one at ``+k // 2`` vanishes in v0 and v1;
* 1e-7 is added to the sum that normalises an element.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from adaptconv.errors import ConvArgumentError
from adaptconv.kernels.base import Ints, per_axis
from adaptconv.kernels.construct import spread
from adaptconv.kernels.profiles import Rule
from adaptconv.kernels.spacing import LearnableSpacing
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d, _Adaptive
from adaptconv.taps import TapPattern

__all__ = ["Dcls1d", "Dcls2_1d", "Dcls2d", "Dcls2dK1d", "Dcls3_1d", "Dcls3d"]

_ORDER = {"v0": {1: (0,), 2: (0, 1), 3: (0, 2, 1)}, "other": {1: (0,), 2: (1, 0), 3: (2, 1, 0)}}
_EPS = 1e-7


@dataclass(frozen=True)
class PeerSpacing(LearnableSpacing):
    """Learnable spacings by the ``dcls`` package's conventions."""

    def _check_count(self, positions: int) -> None:
        if self.count > positions:
            warnings.warn(
                f"{self.count} elements in {positions} positions: kernel_count={self.count} is the number of weights, "
                f"dilated_kernel_size={self.window} the size of the kernel in which they move",
                stacklevel=2,
            )

    def _rule_for(self, window: tuple[int, ...]) -> Rule:
        order = _ORDER.get(self.version, _ORDER["other"])[len(window)]
        centre = tuple(window[row] // 2 for row in order)
        return replace(Rule.of(self.version, window), order=order, centre=centre, clamped=False, eps=_EPS)

    def _reach(self) -> list[tuple[int, int]]:
        return [(-(k // 2), k // 2) for k in self.rule.window]

    def settle(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing: positions stay as they were saved."""


@dataclass(frozen=True)
class _WideSpacing(PeerSpacing):
    """Gaussians at least one position wide."""

    def _rule_for(self, window: tuple[int, ...]) -> Rule:
        rule = super()._rule_for(window)
        return replace(rule, least=1.0) if self.version == "gauss" else rule


@dataclass(frozen=True)
class _FlatSpacing(PeerSpacing):
    """A 1-D kernel along one axis of two."""

    along: int = 0

    def _sizes(self, axes: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (), per_axis(self.window, 1, "dilated_kernel_size")

    def _taps_for(self, window: tuple[int, ...]) -> TapPattern:
        return TapPattern.grid((*window, 1) if self.along == 0 else (1, *window))


class _ConstructedBy:
    """What ``layer.DCK`` is there: the construction, callable, with a version of its own to set."""

    def __init__(self, layer: _Dcls) -> None:
        self._layer = layer

    @property
    def version(self) -> str:
        return self._layer.version

    @version.setter
    def version(self, version: str) -> None:
        self._layer.version = version

    def __call__(self, weight: Tensor, position: Tensor, sigma: Tensor | None = None) -> Tensor:
        """The constructed kernel ``[C_out, C_in/groups, *window]``."""
        return spread(weight, position, sigma, self._layer._spacing.rule)


class _Dcls(_Adaptive):
    """What the classes share."""

    @property
    def _spacing(self) -> PeerSpacing:
        assert isinstance(self._family, PeerSpacing), "a frozen layer has no elements left"
        return self._family

    @property
    def version(self) -> str:
        """The version in use; assign another to change it (max and gauss need a layer made with SIG)."""
        return self._spacing.version

    @version.setter
    def version(self, version: str) -> None:
        if version != self.version:
            self.family = replace(self._spacing, version=version)

    @property
    def kernel_count(self) -> int:
        """Elements in a kernel."""
        return self._spacing.count

    @property
    def dilated_kernel_size(self) -> tuple[int, ...]:
        """The window in which elements move."""
        return self._spacing.rule.window

    @property
    def DCK(self) -> _ConstructedBy:  # noqa: N802 - its name there
        """The construction, by its name there."""
        return _ConstructedBy(self)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Older checkpoints carry buffers of the construction, ``DCK.*``: they hold nothing that is needed."""
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(f"{prefix}DCK.")]

    def extra_repr(self) -> str:
        """The arguments, by their names there."""
        family = self._family
        if not isinstance(family, PeerSpacing):  # frozen
            return str(super().extra_repr())
        parts = [f"{self.in_channels}, {self.out_channels}, kernel_count={family.count}", f"stride={self.stride}"]
        if self.padding != (0,) * len(self.stride):
            parts.append(f"padding={self.padding!r}")
        parts.append(f"version={family.version}")
        if family.dense is not None:
            parts.append(f"dense_kernel_size={family.dense}")
        parts.append(f"dilated_kernel_size={family.rule.window}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join(parts)


class _Dense(_Dcls):
    @property
    def dense_kernel_size(self) -> tuple[int, ...]:
        """The sizes of the leading axes."""
        dense = self._spacing.dense
        assert isinstance(dense, tuple)
        return dense


class Dcls1d(_Dcls, AdaptiveConv1d):
    """1-D convolution with learnable spacings.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_count: number of elements.
        stride, padding, groups, bias, padding_mode: as in ``torch.nn.Conv1d``.
        dilated_kernel_size: the window in which elements move, an int or a 1-tuple.
        version: ``"v0"``, ``"v1"``, ``"max"`` or ``"gauss"``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, stride: Ints = 1, padding: Any = 0,
        dilated_kernel_size: Ints = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
        version: str = "gauss",
    ) -> None:  # fmt: skip
        family = PeerSpacing(kernel_count, dilated_kernel_size, version)
        super().__init__(in_channels, out_channels, family, stride, padding, 1, groups, bias, padding_mode)


class Dcls2d(_Dcls, AdaptiveConv2d):
    """2-D convolution with learnable spacings; arguments as in ``Dcls1d``, sizes as ints or 2-tuples.

    Args:
        use_implicit_gemm: accepted for the sake of code that sets it. How the convolution is computed is decided by
            dispatch, and never at the price of an argument: stride and padding_mode hold either way.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, stride: Ints = 1, padding: Any = 0,
        dilated_kernel_size: Ints = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
        version: str = "gauss", use_implicit_gemm: bool = True,
    ) -> None:  # fmt: skip
        if not isinstance(use_implicit_gemm, bool):
            raise ConvArgumentError(f"use_implicit_gemm must be True or False; got {use_implicit_gemm!r}")
        family = PeerSpacing(kernel_count, dilated_kernel_size, version)
        super().__init__(in_channels, out_channels, family, stride, padding, 1, groups, bias, padding_mode)
        self.use_implicit_gemm = use_implicit_gemm


class Dcls3d(_Dcls, AdaptiveConv3d):
    """3-D convolution with learnable spacings; arguments as in ``Dcls1d``, sizes as ints or 3-tuples."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, stride: Ints = 1, padding: Any = 0,
        dilated_kernel_size: Ints = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
        version: str = "gauss",
    ) -> None:  # fmt: skip
        family = PeerSpacing(kernel_count, dilated_kernel_size, version)
        super().__init__(in_channels, out_channels, family, stride, padding, 1, groups, bias, padding_mode)


class Dcls3_1d(_Dense, AdaptiveConv3d):  # noqa: N801 - its name there
    """3-D convolution whose spacings are learned along the last axis alone; v0, missing there, is served too.

    Args:
        kernel_count: elements of each tap of the leading axes.
        dense_kernel_size: sizes of the two leading axes, an int or a 2-tuple.
        dilated_kernel_size: the window along the last axis, an int or a 1-tuple.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, stride: Ints = 1, padding: Any = 0,
        dense_kernel_size: Ints = 1, dilated_kernel_size: Ints = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", version: str = "gauss",
    ) -> None:  # fmt: skip
        family = PeerSpacing(kernel_count, dilated_kernel_size, version, dense=dense_kernel_size)
        super().__init__(in_channels, out_channels, family, stride, padding, 1, groups, bias, padding_mode)


class Dcls2_1d(_Dense, AdaptiveConv2d):  # noqa: N801
    """2-D convolution whose spacings are learned along the last axis alone; arguments as in ``Dcls3_1d``.

    Its Gaussians have the width ``|SIG| + 1``, not ``|SIG| + 0.27``.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, stride: Ints = 1, padding: Any = 0,
        dense_kernel_size: Ints = 1, dilated_kernel_size: Ints = 1, groups: int = 1, bias: bool = True,
        padding_mode: str = "zeros", version: str = "gauss",
    ) -> None:  # fmt: skip
        family = _WideSpacing(kernel_count, dilated_kernel_size, version, dense=dense_kernel_size)
        super().__init__(in_channels, out_channels, family, stride, padding, 1, groups, bias, padding_mode)


class Dcls2dK1d(_Dcls, AdaptiveConv2d):
    """2-D convolution by a 1-D kernel with learnable spacings.

    Args:
        dilated_kernel_size: the window along the kernel's axis, an int or a 1-tuple.
        flat_dim: the axis the kernel lies along: 0 for H, 1 for W.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_count: int, stride: Ints = 1, padding: Any = 0,
        dilated_kernel_size: Ints = 1, groups: int = 1, bias: bool = True, padding_mode: str = "zeros",
        version: str = "v1", flat_dim: int = 0,
    ) -> None:  # fmt: skip
        if flat_dim not in (0, 1):
            raise ConvArgumentError(f"flat_dim is the axis the kernel lies along, 0 (H) or 1 (W); got {flat_dim!r}")
        family = _FlatSpacing(kernel_count, dilated_kernel_size, version, along=int(flat_dim))
        super().__init__(in_channels, out_channels, family, stride, padding, 1, groups, bias, padding_mode)
        self.flat_dim = flat_dim
