"""Pins: a backend forced, with some of its knobs, for the calls made inside a ``with``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from adaptconv.backends import backend_named
from adaptconv.backends.base import Value


@dataclass(frozen=True, slots=True)
class Pin:
    """A forced backend and the knobs given with it."""

    backend: str
    knobs: tuple[tuple[str, Value], ...] = ()


_PIN: ContextVar[Pin | None] = ContextVar("adaptconv_pin", default=None)
current_pin = _PIN.get


@contextmanager
def pinned(backend: str, **knobs: Value) -> Iterator[None]:
    """Force a backend, in every direction, for the calls made inside.

    Args:
        backend: a registered name, see ``adaptconv.backends()``.
        knobs: values for some of its knobs; the rest stay at their defaults.

    Raises:
        UnknownBackend: on entry, if the name is not registered.
        BackendRejected: by the call inside that the backend declines.
        UnknownKnob: by the call inside for which a knob or value is not declared.
    """
    backend_named(backend)
    token = _PIN.set(Pin(backend, tuple(sorted(knobs.items()))))
    try:
        yield
    finally:
        _PIN.reset(token)
