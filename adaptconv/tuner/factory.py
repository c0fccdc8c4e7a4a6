"""A model and its example inputs from ``package.module:factory``, and inputs as a call takes them."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from adaptconv.compile.optimize import as_arguments
from adaptconv.tuner.result import TuneError

_FORM = "expected 'package.module:factory', where factory() returns (model, inputs)"
_SHAPE = "it must return (model, inputs), inputs being a tensor, a tuple of arguments or a dict of keyword arguments"


def load_factory(text: str) -> tuple[Callable[..., Any], Any]:
    """Import a factory and call it. The current directory is importable, as it is for ``python -m``.

    Args:
        text: ``"package.module:factory"``; factory takes no arguments.

    Returns:
        What the factory returned: the model, and its example inputs as ``tune`` takes them.

    Raises:
        TuneError: the text is malformed, its module or attribute is not there, or the factory fails or
            returns something else.
    """
    module_name, colon, path = text.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module_name.split("."), *path.split("."))):
        raise TuneError(f"{text!r} does not name a factory: {_FORM}")
    factory: Any = _imported(module_name)
    for name in path.split("."):
        if not hasattr(factory, name):
            raise TuneError(f"module '{module_name}' has no attribute '{path}'; {_FORM}")
        factory = getattr(factory, name)
    if not callable(factory):
        raise TuneError(f"'{text}' is not callable but a {type(factory).__name__}; {_FORM}")
    try:
        made = factory()
    except Exception as error:  # it is the user's code, which may raise anything
        raise TuneError(f"the factory '{text}' failed when called without arguments: {_said(error)}") from error
    if not isinstance(made, tuple) or len(made) != 2:
        kind = f"a tuple of {len(made)}" if isinstance(made, tuple) else type(made).__name__
        raise TuneError(f"the factory '{text}' returned {kind}: {_SHAPE}")
    model, inputs = made
    if not callable(model):
        raise TuneError(f"the factory '{text}' returned a {type(model).__name__} for a model, not callable: {_SHAPE}")
    as_arguments(inputs)  # raises where they cannot be arguments
    return model, inputs


def autocast_for(dtype: str | None, model: Callable[..., Any], inputs: Any) -> AbstractContextManager[object]:
    """What to look at a model in that its owner runs under ``torch.autocast``.

    Args:
        dtype: what autocast narrows to, ``"bfloat16"`` or ``"float16"``; None for no autocast.
        model: as ``load_factory`` returns it.
        inputs: likewise; the first tensor of theirs, else of the model's, says on which device.
    """
    if dtype is None:
        return nullcontext()
    owned = model.parameters() if isinstance(model, nn.Module) else ()
    tensors = (t for t in (*tree_leaves(inputs), *owned) if isinstance(t, torch.Tensor))
    kind = next((t.device.type for t in tensors), "cpu")
    return torch.autocast(kind, dtype=getattr(torch, dtype))


def _imported(name: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and f"{name}.".startswith(f"{error.name}."):
            raise TuneError(f"no module '{error.name}' in {here} or on the Python path; {_FORM}") from None
        raise TuneError(f"module '{name}' could not be imported: {_said(error)}") from error
    except Exception as error:  # importing runs the user's code
        raise TuneError(f"module '{name}' could not be imported: {_said(error)}") from error


def _said(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
