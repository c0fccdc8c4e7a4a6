"""The problems of a model: what there is to tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from adaptconv import ops
from adaptconv.compile.optimize import collect_sites
from adaptconv.problem import Problem
from adaptconv.tuner.result import TuneError

_LAYOUTS = ("contiguous", "channels_last", "mixed")


def model_problems(
    model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], *, train: bool = False
) -> tuple[list[Problem], list[str]]:
    """The distinct problems of a call of the model, in every direction needed; why other convolutions are none.

    Raises:
        TuneError: the model cannot be called on these inputs.
    """
    try:
        with ops.watched() as ran:
            sites = collect_sites(model, args, kwargs, train=train)
    except Exception as error:
        text = (str(error).strip().splitlines() or [""])[0]
        raise TuneError(
            f"the model failed when called on the example inputs: {type(error).__name__}: {text}"
        ) from error
    found: dict[str, Problem] = {}
    for site in sites:
        found |= {problem.key(): problem for problem in site.problems() if problem.key() not in found}
    # A tracer gives axes of extent 1 other strides than a call does, from which torch tells the format.
    for problem in (p.problem for plans in ran for p in (plans.forward, plans.grad_input, plans.grad_weight) if p):
        if any(replace(problem, layout=layout).key() in found for layout in _LAYOUTS):
            found.setdefault(problem.key(), problem)
    return list(found.values()), [site.reason for site in sites if site.problem is None]
