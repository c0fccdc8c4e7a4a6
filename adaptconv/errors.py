"""What adaptconv raises: one small family, so that callers can catch it whole."""

from __future__ import annotations


class AdaptConvError(Exception):
    """Base of every error raised on purpose by adaptconv."""


class ConvArgumentError(AdaptConvError, RuntimeError, ValueError):
    """A shape, dtype, stride, padding, group count or tap that cannot be convolved.

    It is a ``RuntimeError`` because that is what torch raises for the same mistakes, and a
    ``ValueError`` because that is what it is.
    """


class ConvTypeError(AdaptConvError, TypeError):
    """An operand that is not a tensor, or a geometry that is not made of ints: what torch calls a TypeError."""


class ExampleInputsError(AdaptConvError, ValueError):
    """Example inputs that a model cannot be called with."""


class BackendRejected(AdaptConvError, RuntimeError):
    """A pinned backend declined a problem; the message holds its reason."""

    def __init__(self, backend: str, reason: str, problem: object) -> None:
        super().__init__(
            f"backend '{backend}' is pinned but declines this problem: {reason}\n"
            f"  problem: {problem}\n"
            f"  what to do: leave the pin, or see every candidate with adaptconv.explain(problem)"
        )
        self.backend = backend
        self.reason = reason


class UnknownBackend(AdaptConvError, ValueError):
    """A backend name that is not registered."""


class UnknownKnob(AdaptConvError, ValueError):
    """A knob, or a value of a knob, that a backend does not declare."""


class KernelWarning(UserWarning):
    """A kernel did not compile or launch; the call was answered by another way."""


def told(failure: BaseException) -> str:
    """An exception in one line: its type, and the first and last line of its text; compilers end with the reason."""
    lines = str(failure).strip().splitlines()
    said = " ... ".join(dict.fromkeys(line.strip() for line in (*lines[:1], *lines[-1:])))
    return f"{type(failure).__name__}: {said}"
