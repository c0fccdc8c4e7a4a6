"""``optimize``: a model, a class or a function compiled through the adaptconv backend.

And the dry run that finds a model's sites without compiling anything.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, fx, nn

from adaptconv.compile.inductor import LOG_OPTION, SiteLog, backend, new_log
from adaptconv.compile.sites import Site, find_sites
from adaptconv.errors import AdaptConvError, ExampleInputsError

Target = TypeVar("Target", bound=Callable[..., Any])
_OPTIMIZED: weakref.WeakKeyDictionary[Any, SiteLog] = weakref.WeakKeyDictionary()
_BUILT_ALIKE: dict[Any, SiteLog] = {}  # kept for good: an id that went with its model would be a new one next time


class NotOptimizable(AdaptConvError, TypeError):
    """Something that is neither a module, a module class nor a function, or that another backend is to compile."""


@overload
def optimize(model: Target, **compile_options: Any) -> Target: ...
@overload
def optimize(model: None = None, **compile_options: Any) -> Callable[[Target], Target]: ...
def optimize(model: Any = None, **compile_options: Any) -> Any:
    """Compile with convolutions dispatched from the tuning database.

    Use it as a call, ``fast = adaptconv.optimize(model)``, or as a decorator of a module class or a
    function, with or without options. Tune first (``adaptconv.tune``) or later: tuning makes the next
    call compile anew.

    Args:
        model: an ``nn.Module`` (returned compiled; parameters are shared), a subclass of ``nn.Module``
            (its instances compile themselves), or a function.
        compile_options: ``mode``, ``dynamic``, ``fullgraph``, ``options`` and whatever else ``torch.compile``
            takes, ``backend`` apart; ``mode`` and ``options`` may be given together, the options then count.

    Raises:
        NotOptimizable: ``model`` is none of those, or another backend is asked for.
        RuntimeError: a mode or an option that Inductor does not have (torch's own message lists them).
    """
    if model is None:
        return functools.partial(optimize, **compile_options)
    if isinstance(model, type) and issubclass(model, nn.Module):
        return _optimize_class(model, compile_options)
    if not isinstance(model, nn.Module) and not (callable(model) and not isinstance(model, type)):
        raise NotOptimizable(
            f"adaptconv.optimize takes an nn.Module, a subclass of it or a function, got {type(model).__name__}"
        )
    log = _log_for(model)
    compiled = torch.compile(model, **_with_log(compile_options, log))
    _OPTIMIZED[compiled] = log
    return compiled


def _optimize_class(cls: type[nn.Module], compile_options: dict[str, Any]) -> type[nn.Module]:
    """Wrap ``__init__`` in place, so that isinstance, super() and pickling see the class they know."""
    original = cls.__init__

    @functools.wraps(original)
    def initialise(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self not in _OPTIMIZED:  # a subclass's own __init__ runs through here once
            log = _log_for(self)
            _compile_in_place(self, _with_log(compile_options, log))
            _OPTIMIZED[self] = log

    cls.__init__ = initialise  # type: ignore[method-assign]
    return cls


def _compile_in_place(module: nn.Module, options: dict[str, Any]) -> None:
    """``Module.compile``; dynamo leaves frames of torch's own alone, so where forward is one, it gets one around it."""
    if not type(module).forward.__module__.startswith("torch.nn."):
        module.compile(**options)
        return
    from torch._dynamo.external_utils import wrap_inline

    module._compiled_call_impl = torch.compile(wrap_inline(module._call_impl), **options)


def _log_for(model: Any) -> SiteLog:
    """The log of everything built alike: twins share their log as they share their compiled code.

    The log's id is among the backend's options, and dynamo compiles anew for options it has not seen, a
    few times for one piece of code and then never again. A log of its own for every instance of a class
    would leave the ninth uncompiled.
    """
    if not isinstance(model, nn.Module):
        built: Any = getattr(model, "__code__", id(model))
    else:
        modules = tuple((name, type(module)) for name, module in model.named_modules())
        shaped = [(name, p) for name, p in model.named_parameters() if not nn.parameter.is_lazy(p)]
        built = (modules, tuple((name, tuple(p.shape)) for name, p in shaped))
    if built not in _BUILT_ALIKE:
        _BUILT_ALIKE[built] = new_log()
    return _BUILT_ALIKE[built]


def _with_log(compile_options: Mapping[str, Any], log: SiteLog) -> dict[str, Any]:
    """torch.compile's arguments, its mode and options checked and written out as for torch's own backend."""
    kept = dict(compile_options)
    if "backend" in kept:
        raise NotOptimizable(
            f"adaptconv.optimize compiles through its own backend, which ends in Inductor; got backend="
            f"{kept['backend']!r}. Leave it out, or use torch.compile(model, backend=...) and adaptconv.adapt(model)"
        )
    options = dict(kept.pop("options", None) or {})
    for_dynamo = {name: options.pop(name) for name in ("guard_filter_fn",) if name in options}
    checked = torch._TorchCompileInductorWrapper(kept.pop("mode", None), options, kept.get("dynamic")).config
    return {**kept, "backend": backend, "options": {**checked, **for_dynamo, LOG_OPTION: log.id}}


def log_of(model: Any) -> SiteLog | None:
    """The site log of an optimized model or function; None if it is not optimized."""
    try:
        return _OPTIMIZED.get(model)
    except TypeError:  # not hashable, or not weakly referable: nothing optimize() returned
        return None


def forget_compiled() -> None:
    """Make every compiled graph compile anew at its next call, with the plans of today's database."""
    torch._dynamo.reset()
    for log in _BUILT_ALIKE.values():
        log.clear()


def collect_sites(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None, *, train: bool = False
) -> list[Site]:
    """The convolution sites a call of the model goes through, found by tracing it; nothing is compiled.

    Sums come before the convolutions they are made of. The model is called once on the inputs: its
    parameters, buffers, training flag and the random state are left as they were.

    Args:
        model: a module or function, optimized or not.
        args: example inputs by position.
        kwargs: example inputs by name.
        train: trace with gradients on, so that sites know which gradients training asks for.
    """
    sites: list[Site] = []

    def keep(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        for module in gm.modules():
            if isinstance(module, fx.GraphModule):
                sites.extend(find_sites(module))
        return gm.forward

    plain = getattr(model, "_orig_mod", model)
    plain = getattr(plain, "_torchdynamo_orig_callable", plain)
    # A module optimized in place would compile itself inside the trace.
    call = plain.forward if isinstance(plain, nn.Module) else plain
    with _untouched(plain), _forgotten(), torch.set_grad_enabled(train):
        traced = torch.compile(call, backend=keep, dynamic=False)
        traced(*args, **(kwargs or {}))
    return sites


@contextmanager
def _forgotten() -> Iterator[None]:
    """Make dynamo forget what it compiles inside, however often this code was traced before.

    Otherwise each trace would count against the few times that dynamo compiles one piece of code.
    """
    from torch._dynamo.convert_frame import register_bytecode_hook

    codes: list[CodeType] = []
    hook = register_bytecode_hook(lambda code, compiled: codes.append(code))
    try:
        with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
            yield
    finally:
        hook.remove()
        for code in codes:
            torch._dynamo.reset_code(code)  # type: ignore[attr-defined]


def as_arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Example inputs as positional and keyword arguments.

    Raises:
        ExampleInputsError: neither a tensor nor a tuple, list or dict with names for keys.
    """
    if isinstance(inputs, Tensor):
        return (inputs,), {}
    if isinstance(inputs, tuple | list):
        return tuple(inputs), {}
    if isinstance(inputs, Mapping) and all(isinstance(name, str) for name in inputs):
        return (), dict(inputs)
    raise ExampleInputsError(
        "example inputs must be a tensor, a tuple or list of arguments, or a dict of keyword arguments; "
        f"got {type(inputs).__name__}"
    )


def _distinct(buffer: Tensor) -> Tensor:
    """A buffer, or of one that was expanded the elements that have memory of their own."""
    if buffer.layout is not torch.strided or buffer.is_mkldnn:
        return buffer
    return buffer[tuple(slice(0, 1) if step == 0 else slice(None) for step in buffer.stride())]


@contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Put back buffers (batch-norm statistics) and random state that a trial call may change."""
    buffers: list[tuple[Tensor, Tensor]] = []
    if isinstance(model, nn.Module):
        buffers = [(buffer, buffer.detach().clone()) for buffer in map(_distinct, model.buffers())]
    with torch.random.fork_rng():
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
