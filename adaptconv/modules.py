"""AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d: torch.nn's convolutions, dispatched, with taps anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adaptconv import ops
from adaptconv.errors import ConvArgumentError
from adaptconv.functional import Call, prepared, traced
from adaptconv.kernel import Kernel
from adaptconv.taps import TapPattern
from adaptconv.trilinear import Plans

Taps = TapPattern | str | Sequence[Any] | Tensor


def as_taps(taps: Taps, axes: int) -> TapPattern:
    """A tap pattern from what users write: a ``TapPattern``, its text, or a mask.

    Raises:
        ConvArgumentError: it cannot be read, or has another number of axes.
    """
    if isinstance(taps, str):
        taps = TapPattern.parse(taps)
    elif not isinstance(taps, TapPattern):
        taps = TapPattern.from_mask(taps)
    if taps.axes != axes:
        raise ConvArgumentError(f"AdaptiveConv{axes}d needs taps with {axes} axes, got a window {taps.window}")
    if not len(taps):
        raise ConvArgumentError("a layer needs at least one tap; this pattern has none")
    return taps


class _Adaptive(nn.modules.conv._ConvNd):
    """What the three share. With ``taps`` the weight is compact, ``[C_out, C_in/groups, T]``."""

    _axes: int
    taps: TapPattern | None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1, bias: bool = True, padding_mode: Any = "zeros", device: Any = None,
        dtype: Any = None, *, taps: Taps | None = None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        if (taps is None) == (kernel_size is None):
            raise ConvArgumentError(f"{name} needs either a kernel_size or taps=, and not both")
        pattern = None if taps is None else as_taps(taps, self._axes)
        if pattern is not None:
            if dilation != 1 and tuple(dilation if isinstance(dilation, (tuple, list)) else ()) != (1,) * self._axes:
                raise ConvArgumentError(
                    f"{name}: taps already say where they sit; leave dilation at 1, got {dilation!r}"
                )
            kernel_size = pattern.window
        # The next class in line is torch's Conv1d, Conv2d or Conv3d.
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode,  # type: ignore[arg-type]
            device, dtype,
        )  # fmt: skip
        self.taps = pattern
        if pattern is not None:  # a compact weight, initialised as torch would a kernel of T taps
            shape = (out_channels, in_channels // groups, len(pattern))
            self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters()

    @property
    def kernel(self) -> Kernel:
        """The layer's kernel as weights on taps."""
        pattern = self.taps or TapPattern.grid(self.kernel_size, self.dilation)
        return Kernel(self.weight.flatten(2), pattern)

    @property
    def plans(self) -> Plans | None:
        """The plans of the last eager call; None before the first."""
        call: Call | None = self.__dict__.get("_last_call")
        return None if call is None else call.plans

    def _padded(self, input: Tensor) -> tuple[Tensor, Any]:
        """Apply a padding mode that is not zeros; the padding left for the convolution."""
        if self.padding_mode == "zeros":
            return input, self.padding
        return F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input [N, C_in, *spatial]`` or ``[C_in, *spatial]``."""
        if torch.compiler.is_dynamo_compiling():
            input, padding = self._padded(input)
            return traced(
                self._axes, input, self.weight, self.bias, self.stride, padding, self.dilation, self.groups, self.taps
            )  # fmt: skip
        if torch._C._is_any_autocast_enabled():
            input, weight, bias = ops.autocasted(input, self.weight, self.bias)
        else:
            weight, bias = self.weight, self.bias
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._padded(input)
        call = prepared(
            self._axes, input, weight, bias, self.stride, padding, self.dilation, self.groups, self.taps
        )  # fmt: skip
        self.__dict__["_last_call"] = call  # for the report: past nn.Module's slow __setattr__
        return call.run(input, weight, bias)

    def extra_repr(self) -> str:
        """Torch's, with the taps where there are any."""
        if self.taps is None:
            return str(super().extra_repr())
        parts = [f"{self.in_channels}, {self.out_channels}, taps={str(self.taps)!r}", f"stride={self.stride}"]
        if self.padding != (0,) * self._axes:
            parts.append(f"padding={self.padding}")
        if self.groups != 1:
            parts.append(f"groups={self.groups}")
        if self.bias is None:
            parts.append("bias=False")
        if self.padding_mode != "zeros":
            parts.append(f"padding_mode={self.padding_mode}")
        return ", ".join(parts)

    def __getstate__(self) -> dict[str, Any]:
        """Prepared calls hold closures: they stay behind on pickling and copying."""
        state = dict(super().__getstate__() if hasattr(super(), "__getstate__") else self.__dict__)
        state.pop("_last_call", None)
        return state


_DOC = """{axes}-D convolution with ``torch.nn.Conv{axes}d``'s signature, state_dict and initialisation, dispatched.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: taps of a regular grid; leave out when ``taps`` is given.
        taps: where the taps sit instead: a ``TapPattern``, its text (``"10101/00100"``), or a mask. The
            parameter ``weight`` is then compact, ``[C_out, C_in/groups, T]``.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in torch.

    Input ``[N, C_in, {spatial}]`` or ``[C_in, {spatial}]``; output as torch's.

    Raises:
        ConvArgumentError: arguments that do not fit together.
"""


class AdaptiveConv1d(_Adaptive, nn.Conv1d):  # noqa: D101 - its docstring is made from _DOC
    __doc__ = _DOC.format(axes=1, spatial="L")
    _axes = 1


class AdaptiveConv2d(_Adaptive, nn.Conv2d):  # noqa: D101
    __doc__ = _DOC.format(axes=2, spatial="H, W")
    _axes = 2


class AdaptiveConv3d(_Adaptive, nn.Conv3d):  # noqa: D101
    __doc__ = _DOC.format(axes=3, spatial="D, H, W")
    _axes = 3
