"""The registered backends: one explicit tuple, in the order in which ties are broken."""

from __future__ import annotations

from adaptconv.backends.base import Backend, Choice, Config, Knob, Space
from adaptconv.backends.cpp.backend import Cpp
from adaptconv.backends.dense import Dense
from adaptconv.backends.dual import Dual
from adaptconv.backends.factored import Factored
from adaptconv.backends.gather import Gather
from adaptconv.backends.native import Native, is_plain
from adaptconv.backends.triton.banded.backend import Banded
from adaptconv.backends.triton.depthwise.backend import Depthwise
from adaptconv.backends.triton.sparse.backend import Sparse
from adaptconv.errors import UnknownBackend

BACKENDS: tuple[Backend, ...] = (
    Native(), Dense(), Gather(), Dual(), Factored(), Cpp(), Sparse(), Depthwise(), Banded(),
)  # fmt: skip
_BY_NAME = {backend.name: backend for backend in BACKENDS}


def backend_names() -> tuple[str, ...]:
    """Names of the registered backends, native first."""
    return tuple(_BY_NAME)


def backend_named(name: str) -> Backend:
    """A backend by name.

    Raises:
        UnknownBackend: nothing of that name is registered.
    """
    try:
        return _BY_NAME[name]
    except KeyError:
        raise UnknownBackend(f"no backend is called {name!r}; registered: {', '.join(_BY_NAME)}") from None


__all__ = ["BACKENDS", "Backend", "Choice", "Config", "Knob", "Space", "backend_named", "backend_names", "is_plain"]
