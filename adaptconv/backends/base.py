"""What a backend is: a name, a reason to decline, declared knobs, a predicted cost, and a way to run."""

from __future__ import annotations

import itertools
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from adaptconv.errors import UnknownKnob
from adaptconv.problem import Problem

Value = str | int | bool
Call = Callable[[Tensor, Tensor, Tensor | None], Tensor]
transformed = torch._C._are_functorch_transforms_active


class Config(Mapping[str, Value]):
    """An immutable, hashable assignment of knobs, with one canonical text."""

    __slots__ = ("_hash", "_items")

    def __init__(self, values: Mapping[str, Value] | None = None, /, **named: Value) -> None:
        self._items = tuple(sorted({**(values or {}), **named}.items()))
        self._hash = hash(self._items)

    def __getitem__(self, name: str) -> Value:
        for key, value in self._items:
            if key == name:
                return value
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self._items == other._items if isinstance(other, Config) else NotImplemented

    def __str__(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self._items)

    def __repr__(self) -> str:
        return f"Config({self})"


@dataclass(frozen=True, slots=True)
class Knob:
    """One declared choice of a backend.

    Attributes:
        name: an identifier.
        values: every value it may take.
        default: the value used when nothing was measured; one of ``values``.
        help: what it does, in one line.
    """

    name: str
    values: tuple[Value, ...]
    default: Value
    help: str

    def __post_init__(self) -> None:
        if self.default not in self.values:
            raise UnknownKnob(f"knob '{self.name}': default {self.default!r} is not among its values {self.values}")


@dataclass(frozen=True, slots=True)
class Space:
    """The declared knobs of a backend for one problem; it can enumerate and check itself."""

    knobs: tuple[Knob, ...] = ()

    @property
    def default(self) -> Config:
        """Every knob at its default."""
        return Config({knob.name: knob.default for knob in self.knobs})

    @property
    def size(self) -> int:
        """How many configurations there are."""
        return math.prod(len(knob.values) for knob in self.knobs)

    def __iter__(self) -> Iterator[Config]:
        names = [knob.name for knob in self.knobs]
        for values in itertools.product(*(knob.values for knob in self.knobs)):
            yield Config(dict(zip(names, values, strict=True)))

    def problem_with(self, config: Mapping[str, Value]) -> str | None:
        """Why a configuration does not belong to this space, in words; None if it does."""
        declared = {knob.name: knob for knob in self.knobs}
        for name, value in config.items():
            if name not in declared:
                return f"unknown knob '{name}'; declared: {', '.join(declared) or 'none'}"
            values = declared[name].values
            if not any(value == v and type(value) is type(v) for v in values):
                return f"knob '{name}' cannot be {value!r}; declared values: {', '.join(map(repr, values))}"
        missing = [name for name in declared if name not in config]
        return f"missing knob '{missing[0]}'" if missing else None

    def __contains__(self, config: object) -> bool:
        return isinstance(config, Mapping) and self.problem_with(config) is None

    def complete(self, values: Mapping[str, Value]) -> Config:
        """Fill a partial assignment with defaults.

        Raises:
            UnknownKnob: a knob or value that is not declared.
        """
        config = Config({**self.default, **values})
        reason = self.problem_with(config)
        if reason:
            raise UnknownKnob(reason)
        return config


@dataclass(frozen=True, slots=True)
class Choice:
    """A backend at a version with a configuration: all a record or a graph ever says about how to run."""

    backend: str
    version: int
    config: Config

    def __str__(self) -> str:
        """Canonical text, e.g. ``gather@1{form=rows,workspace_mib=64}``."""
        return f"{self.backend}@{self.version}{{{self.config}}}"

    @staticmethod
    def parse(text: str) -> Choice:
        """Read the canonical text back; values are ints, booleans or plain words, nothing else.

        Raises:
            ValueError: the text is not of that form.
        """
        match = re.fullmatch(r"(\w+)@(\d+)\{([^{}]*)\}", text)
        if match is None:
            raise ValueError(f"not a plan: {text!r}; expected 'backend@version{{knob=value,...}}'")
        pairs = [pair.partition("=") for pair in match[3].split(",") if pair]
        return Choice(match[1], int(match[2]), Config({name: _value(value) for name, _, value in pairs}))


def _value(text: str) -> Value:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if re.fullmatch(r"-?\d+", text) else text


def laid_out(t: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A tensor in a memory format; as it is under a torch.func transform, where formats cannot be asked for."""
    if memory_format is not torch.contiguous_format and transformed():
        return t
    return t.contiguous(memory_format=memory_format)


def one_by_one(op: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, int]]:
    """A vmap rule of an op: one call an element, as torch's fallback does, without its warning."""

    def rule(info: Any, in_dims: Sequence[Any], *args: Any) -> tuple[Tensor, int]:
        def element(i: int) -> Tensor:
            pairs = zip(args, in_dims, strict=True)
            return op(*(a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a for a, dim in pairs))

        return torch.stack([element(i) for i in range(info.batch_size)]), 0

    return rule


class Backend(ABC):
    """One sound way to compute a convolution. Stateless; one instance is registered.

    Operands ``a, b`` are, by direction: FORWARD ``x [N, C_in, *spatial]``, ``w [C_out, C_in/groups, T]``;
    GRAD_INPUT ``dy [N, C_out, *out_spatial]``, ``w``; GRAD_WEIGHT ``x``, ``dy``. Results are ``y``, ``dx``
    and ``dw [C_out, C_in/groups, T]`` in the operands' dtype and in the problem's memory format.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    summary: ClassVar[str]

    @abstractmethod
    def rejects(self, problem: Problem) -> str | None:
        """Why this backend cannot run the problem, in words; None if it can."""

    @abstractmethod
    def space(self, problem: Problem) -> Space:
        """The knobs this backend offers for the problem."""

    def failure(self, problem: Problem, config: Config) -> str | None:
        """Why a declared configuration is known not to run in this process, in words; None if it may."""
        return None

    @abstractmethod
    def cost(self, problem: Problem, config: Config) -> float:
        """Predicted time in microseconds, from arithmetic and traffic alone."""

    @abstractmethod
    def run(self, problem: Problem, config: Config, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute the result. Pure: torch operations only, traceable, no in-place change of operands."""

    def prepared(self, problem: Problem, config: Config) -> Call:
        """What is called again and again, ``(a, b, bias) -> result``: ``run`` with all settled that can be settled."""
        return partial(self.run, problem, config)

    def default(self, problem: Problem) -> Choice:
        """The choice of this backend with every knob at its default."""
        return Choice(self.name, self.version, self.space(problem).default)
