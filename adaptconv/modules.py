"""AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d: torch.nn's convolutions, dispatched, with kernels of any family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from adaptconv import ops, ranks, sharding, warm
from adaptconv.errors import ConvArgumentError
from adaptconv.functional import Call, prepared
from adaptconv.kernel import Kernel
from adaptconv.kernels.base import Family, Slot, full_precision
from adaptconv.kernels.cache import Constructed
from adaptconv.kernels.grid import FixedTaps, Grid
from adaptconv.problem import same_padding
from adaptconv.taps import TapPattern
from adaptconv.tracing import traced
from adaptconv.trilinear import Plans

_compiling = torch.compiler.is_dynamo_compiling
_Self = TypeVar("_Self", bound="_Adaptive")


class _Adaptive(nn.modules.conv._ConvNd):
    """What the three share.

    A grid is torch's own layer: ``_family`` is then None and the weight ``[C_out, C_in/groups, *size]``. Any
    other family says which tensors the layer keeps, and how they become weights on ``taps``.
    """

    _axes: int
    _family: Family | None = None
    _slots: tuple[str, ...] = ("weight",)
    taps: TapPattern | None = None

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: Any = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1, bias: bool = True, padding_mode: Any = "zeros", device: Any = None,
        dtype: Any = None, *, taps: Any = None,
    ) -> None:  # fmt: skip
        name = type(self).__name__
        if (taps is None) == (kernel_size is None):
            raise ConvArgumentError(f"{name} needs either a kernel_size (or a kernel family) or taps=, and not both")
        family = _family_of(name, kernel_size, taps)
        if family is not None:
            family = family.bound(self._axes)
            if dilation != 1 and tuple(dilation if isinstance(dilation, (tuple, list)) else ()) != (1,) * self._axes:
                raise ConvArgumentError(
                    f"{name}: taps already say where they sit; leave dilation at 1, got {dilation!r}"
                )
        if isinstance(family, Grid):
            kernel_size, dilation, family = family.size, family.dilation, None
        # The next class in line is torch's Conv1d, Conv2d or Conv3d. A family's tensors are made below: torch's
        # own, one value for each position of the window, is then never allocated.
        super().__init__(
            in_channels, out_channels, kernel_size if family is None else family.taps.window, stride, padding, dilation,
            groups, bias, padding_mode, device if family is None else "meta", dtype,  # type: ignore[arg-type]
        )  # fmt: skip
        if padding_mode != "zeros" and isinstance(self.padding, tuple):  # torch repeats what it takes for one number
            pairs = [p if isinstance(p, (tuple, list)) else (p, p) for p in self.padding]
            self._reversed_padding_repeated_twice = [zeros for pair in reversed(pairs) for zeros in pair]
        if family is not None:
            if bias:
                self.bias = nn.Parameter(torch.empty(out_channels, device=device, dtype=dtype))
            self._adopt(family, device=device, dtype=dtype)

    # ---- the kernel ---------------------------------------------------------------------------

    def _adopt(self, family: Family, **where: Any) -> None:
        """Take on a bound family: make its tensors and initialise them."""
        slots = family.slots(self.out_channels, self.in_channels // self.groups)
        self._take(family, {slot.name: torch.empty(slot.shape, **{**where, **_own_dtype(slot)}) for slot in slots})
        self.reset_parameters()

    def _take(self, family: Family, tensors: Mapping[str, Tensor | None]) -> None:
        """Hold these tensors in a bound family's slots."""
        slots = family.slots(self.out_channels, self.in_channels // self.groups)
        self._family, self.taps, self._slots = family, family.taps, tuple(slot.name for slot in slots)
        self.kernel_size = self.taps.window
        self._follow_window(self.taps.window)
        self.__dict__.pop("_constructed", None)
        self.__dict__.pop("_last_call", None)
        self.__dict__.pop("_warm", None)
        for slot in slots:
            tensor = tensors[slot.name]
            if slot.learnable:
                parameter = tensor if tensor is None or isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
                self.register_parameter(slot.name, parameter)
            else:
                self.register_buffer(slot.name, tensor)

    def _follow_window(self, window: tuple[int, ...]) -> None:
        """What torch derives from a kernel's extent when a layer is made: the padding of other modes than zeros."""
        if self.padding == "same":
            pairs = [zeros for pair in reversed(same_padding(window)) for zeros in pair]
            self._reversed_padding_repeated_twice = pairs

    def _tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self._slots}

    @property
    def family(self) -> Family:
        """The family of the layer's kernel. Assigning one of the same tensors (say, another version) changes it."""
        return self._family or Grid(self.kernel_size, self.dilation)

    @family.setter
    def family(self, family: Family) -> None:
        family = family.bound(self._axes)
        wanted = {s.name: s.shape for s in family.slots(self.out_channels, self.in_channels // self.groups)}
        held = {name: tuple(getattr(self, name).shape) for name in wanted if hasattr(self, name)}
        if held != wanted:
            raise ConvArgumentError(
                f"{family!r} needs tensors {wanted}; this layer holds {held}: make a new layer for it"
            )
        if isinstance(family, Grid):
            self._family, self.taps, self._slots = None, None, ("weight",)
            self.kernel_size, self.dilation = family.size, family.dilation  # type: ignore[assignment]
            self._follow_window(family.taps.window)
            return
        self.dilation = (1,) * self._axes
        for name in self._slots:
            if name not in wanted and name not in family.spare:
                delattr(self, name)  # say, the mask of a kernel that is masked by density from now on
        self._take(family, {name: getattr(self, name) for name in wanted})
        with torch.no_grad():
            family.settle(self._tensors())

    @property
    def kernel(self) -> Kernel:
        """The layer's kernel as weights on taps, differentiable."""
        if self._family is None:
            return Kernel(self.weight.flatten(2), TapPattern.grid(self.kernel_size, self.dilation))
        with full_precision(self.weight.device):
            return self._family.kernel(*self._tensors().values())

    def _weight(self, family: Family) -> Tensor:
        """The weight of a call: the parameter itself, or what the family makes of its tensors."""
        if family.identity:
            return self.weight
        tensors = [getattr(self, name) for name in self._slots]
        keeps = family.constructed and not torch.compiler.is_compiling() and not ranks.may_be_sharded_by_fsdp()
        if keeps:
            kept = self.__dict__.get("_constructed")
            if kept is not None and kept.still(family, tensors):
                return kept.weight  # type: ignore[no-any-return]
        with full_precision(tensors[0].device):
            if _is_sharded(*tensors):
                return sharding.replicated(family.compact, self._tensors())
            weight = family.compact(*tensors)
        if keeps:
            self.__dict__["_constructed"] = Constructed.of(family, tensors, weight)
        return weight

    def reset_parameters(self) -> None:
        """Initialise as torch would a kernel of as many taps, or as the family does."""
        family = getattr(self, "_family", None)
        if family is None:
            super().reset_parameters()
            return
        tensors = self._tensors()
        if any(tensor.is_meta for tensor in tensors.values()):
            return
        with torch.no_grad():
            family.reset(tensors)
            if self.bias is not None:
                bound = max(family.fan_in(self.in_channels // self.groups), 1) ** -0.5
                nn.init.uniform_(self.bias, -bound, bound)

    def clamp_parameters(self) -> None:
        """Bring learned parameters back into their range, in place: call it after each optimizer step.

        Positions of learnable spacings are the ones with a range; for other families there is nothing to do.
        """
        if self._family is not None:
            with torch.no_grad():
                self._family.clamp(self._tensors())

    def freeze(self: _Self, **how: Any) -> _Self:
        """Make the kernel as it stands a static pattern of taps, in place, so that sparse backends apply.

        The layer then holds one compact weight on the taps that are not zero in every channel.

        Args:
            how: ways the family knows, e.g. ``positions="nearest"`` of learnable spacings.

        Raises:
            ConvArgumentError: no tap is left, or an unknown way.
        """
        with torch.no_grad():
            kernel = self.family.frozen(*self._tensors().values(), **how)
        for name in (*self._slots, *(n for n in self.family.spare if n in self._parameters)):
            delattr(self, name)
        self.dilation = (1,) * self._axes
        self._take(FixedTaps(kernel.taps), {"weight": kernel.weight.detach().to(memory_format=torch.contiguous_format)})
        return self

    # ---- the call -----------------------------------------------------------------------------

    @property
    def plans(self) -> Plans | None:
        """The plans of the last eager call; None before the first, and where a family computes in steps."""
        call: Call | None = self.__dict__.get("_last_call")
        return None if call is None else call.plans

    def _padded(self, input: Tensor) -> tuple[Tensor, Any]:
        """Apply a padding mode that is not zeros; the padding left for the convolution."""
        if self.padding_mode == "zeros":
            return input, self.padding

        def pad(whole: Tensor) -> Tensor:
            return F.pad(whole, self._reversed_padding_repeated_twice, mode=self.padding_mode)

        return sharding.by_channel(pad, self._axes, input) if _is_sharded(input) else pad(input), 0

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``input [N, C_in, *spatial]`` or ``[C_in, *spatial]``."""
        family, compiling = self._family, _compiling()
        if family is None and not compiling:
            own = self._parameters  # past nn.Module's slow __getattr__; a parametrized weight is not in it
            held = own.get("weight")
            if held is not None and "bias" in own:
                known = warm.again(self.__dict__, input, held, own["bias"])
                if known is not None:
                    self.__dict__["_last_call"] = known
                    return known.run(input, held, own["bias"])
        if family is not None and family.factorised and not _is_sharded(input):
            input, padding = self._padded(input)
            tensors = [getattr(self, name) for name in self._slots]
            return family.convolve(input, self.bias, tensors, self.stride, padding, self.groups)
        weight, bias = self.weight if family is None else self._weight(family), self.bias
        if compiling:
            input, padding = self._padded(input)
            return traced(
                self._axes, input, weight, bias, self.stride, padding, self.dilation, self.groups, self.taps
            )  # fmt: skip
        if isinstance(input, fx.Proxy) or (family is None and torch._C._get_tracing_state() is not None):
            return self._recorded(input)
        narrowed = ops.autocast_dtype(input) if torch._C._is_any_autocast_enabled() else None
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = self._padded(input)
        call = prepared(
            self._axes, input, weight, bias, self.stride, padding, self.dilation, self.groups, self.taps, narrowed
        )  # fmt: skip
        if family is None and self.padding_mode == "zeros":
            warm.remember(self.__dict__, call, input, weight, bias, narrowed)
        self.__dict__["_last_call"] = call  # for the report: past nn.Module's slow __setattr__
        return call.run(input, weight, bias)

    def _recorded(self, input: Any) -> Tensor:
        """Under torch.jit.trace and torch.fx's tracer, which follow torch's own layer and nothing of ours."""
        if self._family is None:
            recorded: Tensor = super().forward(input)
            return recorded
        raise ConvArgumentError(
            f"{type(self).__name__} with {self._family!r} cannot be recorded by torch.fx's tracer: use torch.export"
        )

    # ---- checkpoints, copies, words -----------------------------------------------------------

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        """Torch's, with the family's word on what came."""
        family = self._family
        if family is not None:
            idle = [prefix + name for name in family.spare if name in self._parameters]
            own = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix) and k not in idle}
            error_msgs += [f"{prefix.rstrip('.') or type(self).__name__}: {m}" for m in family.check_state(own)]
        args = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if family is not None:
            for name in family.may_lack:
                if prefix + name in missing_keys:
                    missing_keys.remove(prefix + name)
        if family is not None and not error_msgs:
            with torch.no_grad():
                family.settle(self._tensors())

    def extra_repr(self) -> str:
        """Torch's, with the family where it is no grid."""
        if self._family is None:
            return str(super().extra_repr())
        kernel = f"taps={str(self.taps)!r}" if isinstance(self._family, FixedTaps) else repr(self._family)
        parts = [f"{self.in_channels}, {self.out_channels}, {kernel}", f"stride={self.stride}"]
        if self.padding != (0,) * self._axes:
            parts.append(f"padding={self.padding!r}")
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
        for name in ("_last_call", "_constructed", "_warm"):
            state.pop(name, None)
        return state


def _family_of(name: str, kernel: Any, taps: Any) -> Family | None:
    """The family a user named by a kernel (an instance, a ``TapPattern`` or its text) or by taps; None for a size."""
    if taps is not None:
        return FixedTaps.of(taps)
    if isinstance(kernel, type) and issubclass(kernel, Family):
        raise ConvArgumentError(
            f"{name} takes a kernel family with its settings, {kernel.__name__}(...), not the class"
        )
    if isinstance(kernel, (TapPattern, str)):
        return FixedTaps.of(kernel)
    return kernel if isinstance(kernel, Family) else None


def _is_sharded(*tensors: Tensor) -> bool:
    """Whether there are DTensors among them; dynamo has its own eyes for those, and no rules of ours."""
    return not torch.compiler.is_dynamo_compiling() and sharding.is_sharded(*tensors)


def _own_dtype(slot: Slot) -> dict[str, Any]:
    return {} if slot.dtype is None else {"dtype": slot.dtype}


_DOC = """{axes}-D convolution with ``torch.nn.Conv{axes}d``'s signature, state_dict and initialisation, dispatched.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: taps of a regular grid, or a kernel family (``adaptconv.kernels``); leave out when
            ``taps`` is given.
        taps: where the taps sit instead: a ``TapPattern``, its text (``"10101/00100"``), or a mask. The
            parameter ``weight`` is then compact, ``[C_out, C_in/groups, T]``.
        stride, padding, dilation, groups, bias, padding_mode, device, dtype: as in torch; dilation stays 1
            where a family or taps say where the taps sit.

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
