"""adapt and restore: a model's convolutions made adaptive in place, and back."""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from adaptconv.errors import ConvArgumentError, ConvTypeError
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d

_log = logging.getLogger("adaptconv.adapt")
_Model = TypeVar("_Model", bound=nn.Module)

_PLAIN: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: AdaptiveConv1d,
    nn.Conv2d: AdaptiveConv2d,
    nn.Conv3d: AdaptiveConv3d,
}
_DCLS = "DCLS.construct.modules"  # where that package has its layers; it need not be installed
_MADE_BY_CALLS = ("_last_call", "_constructed", "_warm")  # what a call of an adaptive layer leaves in its __dict__
_MARK = "_adapted"


@dataclass(frozen=True)
class _Original:
    """What an adapted module was.

    Attributes:
        cls: its class.
        state: its ``__dict__``, where adapting changed more than the class; the values are the module's own.
        ours: names in ``__dict__`` that adapting wrote over or added.
    """

    cls: type[nn.Module]
    state: dict[str, Any] | None = None
    ours: frozenset[str] = frozenset()


def adapt(model: _Model) -> _Model:
    """Make every convolution of a model adaptive, in place.

    Every ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d`` becomes the ``AdaptiveConv`` of its rank, and every layer of
    the ``dcls`` package the one of ``adaptconv.compat.dcls``. A module stays the object it was, with its
    parameters, their names and ties, its hooks and its state_dict: optimizers, references to it and checkpoints
    go on as before. ``restore`` undoes it. A model already adapted stays as it is.

    Parametrized convolutions and those with weight_norm, spectral_norm or pruning are adapted too. Left alone:
    subclasses of torch's layers (the user's own, lazy, transposed, quantized), scripted modules, modules whose
    ``forward`` was replaced on the instance, and weights that are a tensor subclass. What was adapted and what was
    left is logged at level INFO by ``logging.getLogger("adaptconv.adapt")``.

    ``torch.jit.script`` cannot read an adapted layer: restore first.

    Args:
        model: any module, a convolution itself included.

    Returns:
        The model.

    Raises:
        ConvTypeError: not a module.
    """
    done: Counter[str] = Counter()
    for name, module in _modules(model):
        if _MARK in module.__dict__:
            continue
        reason = _adapted(module)
        if reason is None:
            done[module.__dict__[_MARK].cls.__name__] += 1
        elif reason:
            _log.info("left %s (%s) as it is: %s", name or "the model itself", type(module).__name__, reason)
    _log.info("adapted %s", ", ".join(f"{count} {what}" for what, count in sorted(done.items())) or "nothing")
    return model


def restore(model: _Model) -> _Model:
    """Undo ``adapt``, in place: every module it changed has its former class and attributes again.

    What happened to a module in between stays: values of parameters, hooks, attributes set, train or eval. A layer
    whose kernel was changed to another family in between (``freeze()``) cannot go back; it stays adaptive, and a
    warning is logged.

    Args:
        model: any module.

    Returns:
        The model.

    Raises:
        ConvTypeError: not a module.
    """
    for name, module in _modules(model):
        original: _Original | None = module.__dict__.get(_MARK)
        if original is None:
            continue
        family: Any = module._family
        if (family is None) != (original.state is None) or (family is not None and not hasattr(family, "version")):
            _log.warning("left %s adaptive: its kernel is now %r", name or "the model itself", family)
            continue
        if original.state is None:
            _rebase(module, original.cls)
        else:
            _unsettle(module, original)
        for left in (_MARK, *_MADE_BY_CALLS):
            module.__dict__.pop(left, None)
    return model


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise ConvTypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    return list(model.named_modules())


def _adapted(module: nn.Module) -> str | None:
    """Adapt one module: None where that was done, why not where it was not, and ``""`` where nobody would ask."""
    cls: type[Any] = type(module)
    plain = cls.__bases__[0] if is_parametrized(module) else cls
    if cls.__module__ == _DCLS and cls.__name__.startswith("Dcls"):
        return _changed(module) or _settled(module)
    if plain in _PLAIN:
        reason = _changed(module)
        if reason is None:
            _rebase(module, _PLAIN[plain])
            module.__dict__[_MARK] = _Original(plain)
        return reason
    if isinstance(module, (AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d)):
        return ""
    if isinstance(module, nn.modules.conv._ConvNd) or ("Conv" in cls.__name__ and not list(module.children())):
        return "only torch's own Conv1d, Conv2d and Conv3d are adapted, no subclasses"
    return ""


def _changed(module: nn.Module) -> str | None:
    """Why a layer is not what its class says, in words."""
    for name in ("forward", "_conv_forward"):
        if name in module.__dict__:
            return f"its {name} was replaced"
    for name, value in module.__dict__["_parameters"].items():
        if value is not None and type(value) not in (nn.Parameter, Tensor):
            return f"its {name} is a {type(value).__name__}"
    return None


def _rebase(module: nn.Module, cls: type[nn.Module]) -> None:
    """Give a module another class; a parametrized one, whose class torch made for it alone, a class like that."""
    if is_parametrized(module):
        own = {k: v for k, v in vars(type(module)).items() if k not in ("__dict__", "__weakref__", "__doc__")}
        module.__class__ = type(f"Parametrized{cls.__name__}", (cls,), own)
    else:
        module.__class__ = cls


# ---- layers of the dcls package -------------------------------------------------------------------------


def _settled(module: Any) -> str | None:
    """Make a layer of the dcls package one of ours: the settings of a layer made alike, with the tensors it has."""
    from adaptconv.compat import dcls

    type_there = type(module)
    cls = getattr(dcls, type_there.__name__, None)
    if cls is None or "DCK" not in module._modules:
        return "adaptconv.compat.dcls has no such layer"
    state, wanted = dict(module.__dict__), inspect.signature(cls.__init__).parameters
    settings = {name: state[name] for name in wanted if name in state}
    settings.update(bias=module.bias is not None, version=module.DCK.version)  # the one that counts in a call there
    try:
        with torch.device("meta"):  # neither memory nor random numbers are spent on it
            like = cls(**settings)
    except ConvArgumentError as error:
        return str(error)
    shapes = [{k: tuple(p.shape) for k, p in m.named_parameters(recurse=False)} for m in (module, like)]
    if shapes[0] != shapes[1] or list(module.buffers(recurse=False)):
        return f"its tensors are {shapes[0]}, where {shapes[1]} were expected"
    peers = {name for name, child in module._modules.items() if type(child).__module__ == _DCLS}
    fresh = {name: value for name, value in like.__dict__.items() if name not in nn.Module().__dict__}
    fresh["_modules"] = {name: child for name, child in module._modules.items() if name not in peers}
    told = {name for name in state if isinstance(getattr(cls, name, None), property)}  # by the class, from now on
    module.__class__ = cls
    module.__dict__.update(fresh)
    for name in told:
        del module.__dict__[name]
    module.__dict__[_MARK] = _Original(type_there, state, frozenset(fresh) | told)
    return None


def _unsettle(module: Any, original: _Original) -> None:
    """Give a layer of the dcls package its class and attributes back."""
    assert original.state is not None
    version, children = module.version, module._modules
    kept = {name: value for name, value in module.__dict__.items() if name not in original.ours}
    state = {name: original.state[name] for name in original.state if name in original.ours}
    order = [name for name in original.state if name in kept or name in state]
    module.__class__ = original.cls
    module.__dict__.clear()
    module.__dict__.update({**{name: kept.get(name, state.get(name)) for name in order}, **kept})
    module._modules.update(children)
    module.DCK.train(module.training)
    if version != module.DCK.version:
        module.version = module.DCK.version = version
