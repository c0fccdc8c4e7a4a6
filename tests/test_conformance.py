"""Every backend x case x direction x configuration x dtype x layout against the float64 oracle.

``python -m tests.test_conformance`` prints the worst error of each backend, direction and dtype as a
multiple of native's own error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import pytest
import torch
from torch import Tensor

from adaptconv.backends import BACKENDS, Backend, Config, backend_named
from adaptconv.backends.triton import runtime
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.problem import Direction, Problem
from adaptconv.reference import reference, relative_error
from adaptconv.taps import TapPattern
from tests.cases import CASES, Case

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FLOAT = torch.float16  # what every backend takes
LAYOUTS = ("contiguous", "channels_last", "strided")
SLACK = 2.0  # times native's own error
EVERY_CONFIG = 16  # spaces up to this size are walked whole


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run: its error, native's on the same operands, and what makes it wrong whatever its error."""

    config: Config
    dtype: torch.dtype
    layout: str
    error: float
    native: float
    terms: int
    fault: str = ""

    @property
    def bound(self) -> float:
        """Twice native's error, or what a sound sum may cost if native was luckier than that: two roundings
        of the result (of parts, and of their sum), and half the usual growth of a sum's error, float32 at least.
        """
        unit = torch.finfo(self.dtype).eps / 2
        sums = min(unit, torch.finfo(torch.float32).eps / 2)
        return max(SLACK * self.native, 2**0.5 * unit + 0.5 * sums * self.terms**0.5)

    @property
    def verdict(self) -> str:
        """Empty if it conforms, else what is wrong."""
        wrong = self.fault or (f"error {self.error:.2e} > {self.bound:.2e}" if not self.error <= self.bound else "")
        return wrong and f"{str(self.dtype)[6:]} {self.layout} {{{self.config}}}: {wrong}"


def _interpreted(backend: Backend) -> bool:
    """Whether runs are dear: milliseconds an operation of a kernel."""
    return isinstance(backend, TritonBackend) and runtime.interpreting()


def layouts(backend: Backend, dtype: torch.dtype) -> tuple[str, ...]:
    """All of them; of an interpreted kernel fewer where the dtype adds little."""
    if not _interpreted(backend) or dtype is torch.float32:
        return LAYOUTS
    return LAYOUTS[:2] if dtype is torch.bfloat16 else LAYOUTS[:1]


def configs(backend: Backend, problem: Problem) -> list[Config]:
    """The whole space, or its default and each knob's alternatives where it is large."""
    space = backend.space(problem)
    if space.size <= EVERY_CONFIG and not _interpreted(backend):
        return list(space)
    default = space.default
    return [default, *(Config(default, **{k.name: v}) for k in space.knobs for v in k.values if v != k.default)]


def extended(problem: Problem, a: Tensor, b: Tensor, bias: Tensor | None) -> np.ndarray:
    """The problem in extended precision: the oracle is float64, so it cannot judge float64."""
    left, right = (t.double().numpy().astype(np.longdouble) for t in (a, b))
    n, g, forward = problem.batch, problem.groups, problem.direction is Direction.FORWARD
    ins, outs = problem.c_in // g, problem.c_out // g
    padded_extents = [extent + sum(pair) for extent, pair in zip(problem.spatial, problem.padding, strict=True)]
    inner = tuple(slice(p, p + extent) for (p, _), extent in zip(problem.padding, problem.spatial, strict=True))
    x = np.zeros((n, g, ins, *padded_extents), np.longdouble)
    w = np.zeros((g, outs, ins, len(problem.taps)), np.longdouble)
    y = np.zeros((n, g, outs, *problem.out_spatial), np.longdouble)
    if problem.direction is not Direction.GRAD_INPUT:
        x[(..., *inner)] = left.reshape(n, g, ins, *problem.spatial)
    if problem.direction is not Direction.GRAD_WEIGHT:
        w = right.reshape(w.shape)
    if not forward:
        y = (left if problem.direction is Direction.GRAD_INPUT else right).reshape(y.shape)
    # A spread tap reads the sum, over its footprint, of what a plain tap reads.
    footprint = problem.taps.footprint or ((1.0,),) * problem.axes
    shares = [(step, np.longdouble(1)) for step in itertools.product(*map(range, map(len, footprint)))]
    for axis, values in enumerate(footprint):
        shares = [(step, share * np.longdouble(values[step[axis]])) for step, share in shares]
    reads = [
        (t, tuple(o + i for o, i in zip(offset, step, strict=True)), share)
        for t, offset in enumerate(problem.taps.offsets)
        for step, share in shares
    ]
    for t, place, share in reads:
        read = tuple(
            slice(o, o + (count - 1) * step + 1, step)
            for o, count, step in zip(place, problem.out_spatial, problem.stride, strict=True)
        )
        if forward:
            y += share * np.einsum("goi,ngi...->ngo...", w[..., t], x[(..., *read)])
        elif problem.direction is Direction.GRAD_INPUT:
            x[(..., *read)] += share * np.einsum("goi,ngo...->ngi...", w[..., t], y)
        else:
            seen = x[(..., *read)].reshape(n, g, ins, -1)
            w[..., t] += share * np.einsum("ngop,ngip->goi", y.reshape(n, g, outs, -1), seen)
    if forward:
        y = y.reshape(problem.output_shape)
        return y if bias is None else y + bias.double().numpy().reshape(-1, *(1,) * problem.axes)
    if problem.direction is Direction.GRAD_INPUT:
        return x[(..., *inner)].reshape(problem.input_shape)
    return w.reshape(problem.weight_shape)


def error_of(result: Tensor, exact: Tensor | np.ndarray) -> float:
    """Relative L2 error, against the oracle or against extended precision."""
    if isinstance(exact, Tensor):
        return relative_error(result, exact)
    difference = np.sqrt(np.square(result.double().numpy() - exact).sum())
    return float(difference / max(np.sqrt(np.square(exact).sum()), np.finfo(np.float64).tiny))


@lru_cache(maxsize=8)
def operands(
    case: Case, direction: Direction, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | np.ndarray, float]:
    """Operands rounded to a dtype, the exact answer to them, and native's error on them in its worse layout."""
    problem = case.problem(direction, dtype)
    generator = torch.Generator().manual_seed(len(case.name))
    x, w, dy = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in (problem.input_shape, problem.weight_shape, problem.output_shape)
    )
    a, b = {Direction.FORWARD: (x, w), Direction.GRAD_INPUT: (dy, w), Direction.GRAD_WEIGHT: (x, dy)}[direction]
    bias = torch.randn(case.c_out, generator=generator, dtype=torch.float64).to(dtype) if problem.bias else None
    exact = extended(problem, a, b, bias) if dtype is torch.float64 else reference(problem, a, b, bias)
    native = backend_named("native")
    plain = backend_named("dense") if native.rejects(problem) else native
    # Torch's own error differs between its memory formats, by up to 3x; either is native's.
    default = plain.space(problem).default
    both = (Config(default, layout=layout) for layout in plain.space(problem).knobs[0].values)
    return a, b, bias, exact, max(error_of(plain.run(problem, config, a, b, bias), exact) for config in both)


def terms(problem: Problem) -> int:
    """How many products one element of the result adds up, at most."""
    per_group = {Direction.FORWARD: problem.c_in, Direction.GRAD_INPUT: problem.c_out}
    if problem.direction in per_group:
        return per_group[problem.direction] // problem.groups * len(problem.taps)
    return problem.batch * math.prod(problem.out_spatial)


def arranged(t: Tensor, layout: str, axes: int) -> Tensor:
    """The same values in another layout; ``strided`` is contiguous in none."""
    if layout == "channels_last" and t.dim() > 3:
        return t.contiguous(memory_format=torch.channels_last if axes == 2 else torch.channels_last_3d)
    if layout == "strided":
        return torch.stack((t, t + 1), dim=-1)[..., 0]
    return t


def outcomes(backend: Backend, case: Case, direction: Direction) -> Iterator[Outcome]:
    """Run a case every way a backend declares, in the dtypes it takes."""
    for dtype in DTYPES:
        if backend.rejects(case.problem(direction, dtype)):
            continue
        a, b, bias, exact, native = operands(case, direction, dtype)
        for layout in layouts(backend, dtype):
            axes = len(case.spatial)
            if layout == "channels_last" and axes == 1:
                continue
            problem = case.problem(direction, dtype, "contiguous" if layout == "strided" else layout)
            here, there = arranged(a, layout, axes), arranged(b, layout, axes)
            for config in configs(backend, problem):
                versions = here._version, there._version
                result = backend.run(problem, config, here, there, bias)
                fault = "" if (here._version, there._version) == versions else "changes an operand in place"
                if result.dtype is not dtype:
                    fault = f"dtype {result.dtype}"
                elif tuple(result.shape) != tuple(exact.shape):
                    fault = f"shape {tuple(result.shape)}, expected {tuple(exact.shape)}"
                elif direction is not Direction.GRAD_WEIGHT and not result.is_contiguous(
                    memory_format=problem.memory_format
                ):
                    fault = f"strides {result.stride()} are not {problem.memory_format}"
                error = error_of(result, exact) if not fault else float("inf")
                yield Outcome(config, dtype, layout, error, native, terms(problem), fault)


def _marked(backend: Backend) -> object:
    """A test parameter; those of Triton can be picked out by ``-m triton``, to be interpreted."""
    marks = [pytest.mark.triton] if isinstance(backend, TritonBackend) else []
    return pytest.param(backend, id=backend.name, marks=marks)


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("backend", [_marked(backend) for backend in BACKENDS])
def test_agrees_with_the_oracle(backend: Backend, case: Case, direction: Direction) -> None:
    reasons = [backend.rejects(case.problem(direction, dtype)) for dtype in DTYPES]
    for reason in filter(None, reasons):
        assert len(reason) > 10, "a reason is a sentence"
        assert backend.name != "dense", "dense is the fallback: it takes everything"
    if all(reasons):
        return
    wrong = [outcome.verdict for outcome in outcomes(backend, case, direction) if outcome.verdict]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("direction", Direction, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_oracle_agrees_with_extended_precision(case: Case, direction: Direction) -> None:
    problem = case.problem(direction)
    a, b, bias, exact, _ = operands(case, direction, torch.float64)
    assert error_of(reference(problem, a, b, bias), exact) < 1e-15


@pytest.mark.triton
def test_every_backend_runs_much_and_every_case_runs_somewhere() -> None:
    """A conformance test in which everything is rejected proves nothing."""
    accepted = {
        backend.name: {c.name for c in CASES if all(backend.rejects(c.problem(d, FLOAT)) is None for d in Direction)}
        for backend in BACKENDS
        if not isinstance(backend, TritonBackend) or runtime.interpreting()
    }
    spread = sum(TapPattern.parse(c.taps).footprint is not None for c in CASES)
    least = {"native": 40, "dense": len(CASES), "gather": len(CASES) - spread, "dual": 8, "factored": 8, "cpp": 12}
    for name, cases in accepted.items():
        assert len(cases) >= least.get(name, 1), f"{name} runs only {sorted(cases)}"
    assert len({c.name for c in CASES}) == len(CASES)


def main() -> None:
    """Print the error of every backend, direction and dtype against native's own."""
    torch.set_num_threads(2)
    print("Error of each backend over native's own on the same operands (dense-constructed where the taps are not one")
    print("grid), over all cases, layouts and configurations. 'pooled': root mean square over root mean square;")
    print("'worst': the largest single ratio, errors below a quarter unit in the last place counted as that;")
    print("'over': outcomes beyond the bound the test holds them to.\n")
    titles = f"{'outcomes':>8} {'pooled':>7} {'worst':>6} {'over':>5}"
    print(f"{'backend':8} {'direction':12} {'dtype':9} {titles}  worst in")
    for backend in BACKENDS:
        for direction in Direction:
            rows: dict[torch.dtype, list[tuple[str, Outcome]]] = {dtype: [] for dtype in DTYPES}
            for each in CASES:
                if any(backend.rejects(each.problem(direction, dtype)) is None for dtype in DTYPES):
                    for outcome in outcomes(backend, each, direction):
                        rows[outcome.dtype].append((each.name, outcome))
            for dtype, found in rows.items():
                if not found:
                    continue
                floor = torch.finfo(dtype).eps / 4
                worst, where = max((max(o.error, floor) / max(o.native, floor), name) for name, o in found)
                square = sum(o.error**2 for _, o in found) / max(sum(o.native**2 for _, o in found), 1e-300)
                over = sum(bool(o.verdict) for _, o in found)
                numbers = f"{len(found):8} {square**0.5:7.2f} {worst:6.2f} {over:5}"
                print(f"{backend.name:8} {direction!s:12} {str(dtype)[6:]:9} {numbers}  {where}", flush=True)


if __name__ == "__main__":
    main()
