"""Entrants: who takes part in the contest for one problem, and with which first configurations."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from adaptconv import records
from adaptconv.backends import BACKENDS, Backend, Choice, Config, backend_named
from adaptconv.backends.costs import is_modelled
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.problem import Problem

if TYPE_CHECKING:
    from adaptconv.tuner.search import Search

_SEEDS = 4
_PROMISING = 8  # configurations that are tried before any others; those of a GPU's kernels are compiled by then


def by_hand(problem: Problem) -> list[Choice]:
    """What a user would write without adaptconv: one choice, or several of which the fastest counts."""
    native = backend_named("native")
    if not native.rejects(problem):
        return [native.default(problem)]
    backends = (backend_named(name) for name in ("dense", "dual"))
    return [backend.default(problem) for backend in backends if not backend.rejects(problem)]


def contenders(problem: Problem) -> list[Backend]:
    """The backends that accept a problem, less dense where every tap is there: it would be native again."""
    accepted = [backend for backend in BACKENDS if not backend.rejects(problem)]
    if problem.taps.is_dense():
        accepted = [backend for backend in accepted if backend.name != "dense"]
    return accepted


def seeds_for(problem: Problem) -> dict[str, list[Config]]:
    """The bests that nearby records, stale ones included, name for each backend, nearest first."""
    seeds: dict[str, list[Config]] = {}
    for _, hit in records.default_store().neighbours(problem, limit=4 * _SEEDS):
        texts = [Choice(hit.record.backend, hit.record.version, Config(hit.record.config))]
        for rival in hit.record.rivals:
            with contextlib.suppress(ValueError):
                texts.append(Choice.parse(rival.choice))
        for choice in texts:
            known = seeds.setdefault(choice.backend, [])
            if len(known) < _SEEDS and choice.config not in known:
                known.append(choice.config)
    return seeds


def promising(problem: Problem, backend: Backend) -> tuple[Config, ...]:
    """What is tried first of a backend: the default and the best predicted; nothing where nothing is predicted."""
    if isinstance(backend, TritonBackend) == is_modelled(problem.device):
        return ()
    space = backend.space(problem)
    ranked = sorted(space, key=lambda config: backend.cost(problem, config))
    return tuple(dict.fromkeys((space.default, *ranked)))[:_PROMISING]


def searches(problem: Problem, trials: int | None, storage: Any, seed: int) -> list[Search]:
    """A search for each backend that takes part. What neighbours name and what promises most take turns.

    Args:
        problem: what they compete on.
        trials: most configurations a backend.
        storage: an open Optuna storage, or None.
        seed: of the samplers.
    """
    from adaptconv.tuner.search import Search  # here, so that importing the tuner does not import optuna

    versions = records.toolchain(torch.device(problem.device.kind))
    scope = " ".join(f"{name} {version}" for name, version in versions.items())
    seeds = seeds_for(problem)
    make = partial(Search, problem, storage=storage, scope=scope, trials=trials, seed=seed)
    return [
        make(backend, seeds=_taking_turns(seeds.get(backend.name, ()), promising(problem, backend)[1:]))
        for backend in contenders(problem)
    ]


def _taking_turns(first: Iterable[Config], second: Iterable[Config]) -> list[Config]:
    pairs = itertools.zip_longest(first, second)
    return [config for pair in pairs for config in pair if config is not None]
