"""Bench: the operands of one problem, and the check that a candidate must pass before it may win.

The oracle looks at a slice of large problems (``slices``); the rest of a candidate's result is compared with the
baseline's, which passed the same check. Every candidate therefore runs on the full operands, as it will be timed.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter_ns

import torch
from torch import Tensor

from adaptconv import trilinear
from adaptconv.backends import Choice, Config, backend_named
from adaptconv.dispatch import Source, plan_from_choice
from adaptconv.errors import KernelWarning, told
from adaptconv.problem import Direction, Problem
from adaptconv.reference import reference, relative_error
from adaptconv.tuner.slices import affordable_slice, taken

# Relative L2 errors that are never held against a candidate: a few roundings of the result.
_FLOORS = {"float64": 1e-13, "float32": 1e-6, "bfloat16": 4e-3, "float16": 5e-4}
_FLOOR_OTHERWISE = 1e-6
_ALLOWED = 2.0  # times the baseline's own error
_OF_A_PLANE = 10.0  # times what is allowed of the whole, in the plane where two results are furthest apart
_TF32 = 2.0**-9  # likewise where torch's flags allow tf32: it is in one kernel of torch and not in another
_WRONG = 30.0  # times what is allowed: beyond rounding, however unfavourably it was summed


class Discarded(Exception):
    """A candidate that may not win, and why.

    Attributes:
        wrong: whether it gave a wrong result, rather than none.
    """

    def __init__(self, reason: str, *, wrong: bool = False) -> None:
        super().__init__(reason)
        self.wrong = wrong


class Bench:
    """One problem with operands of its shapes, dtype and memory formats, and its candidates' results checked.

    Args:
        problem: the problem.
        device: where to run it.
        seed: of the random operands; torch's global generator is left alone.
    """

    def __init__(self, problem: Problem, device: torch.device, seed: int = 0) -> None:
        self.problem = problem
        self.device = device
        self.a, self.b, self.bias = _operands(problem, device, seed)
        self._slice = affordable_slice(problem)
        self._exact: Tensor | None = None
        self._baseline: Tensor | None = None
        self._other_formats: Choice | None = None  # the baseline whose other memory formats were not asked yet
        self.limit = math.inf

    def call(self, choice: Choice) -> Callable[[], Tensor]:
        """Exactly what dispatch runs when a record names this choice.

        Raises:
            AdaptConvError: the choice does not fit the problem.
        """
        plan = plan_from_choice(self.problem, choice, Source.PINNED, "being tuned")
        return partial(trilinear.execute, plan, self.a, self.b, self.bias)

    def once_us(self, call: Callable[[], object]) -> float:
        """One call by the clock, in microseconds; candidates that are far too slow need no better."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        start = perf_counter_ns()
        call()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return (perf_counter_ns() - start) / 1e3

    def set_baseline(self, choice: Choice) -> float:
        """Run the baseline: its error is the measure of all others. Returns that relative L2 error.

        Raises:
            Exception: whatever the baseline raises.
        """
        result = self.call(choice)()
        error = self._error(result)
        floor = _FLOORS.get(self.problem.dtype, _FLOOR_OTHERWISE)
        if self.problem.dtype == "float32" and "conv-tf32" in self.problem.fp32_precision:
            floor = _TF32
        if math.isfinite(error):
            self.limit = max(_ALLOWED * error, floor)
            self._baseline, self._other_formats = result, choice
        else:  # torch itself overflows here: only the oracle is left to compare with
            self.limit, self._baseline = floor, None
        return error

    def _widen(self) -> None:
        """Count torch's error in its other memory format as its own too: the two differ by up to 5x, either way."""
        baseline, self._other_formats = self._other_formats, None
        if baseline is None or self._baseline is None:
            return
        space = backend_named(baseline.backend).space(self.problem)
        for layout in (value for knob in space.knobs if knob.name == "layout" for value in knob.values):
            choice = replace(baseline, config=Config(baseline.config, layout=layout))
            error = self._error(self.call(choice)())
            if math.isfinite(error):
                self.limit = max(self.limit, _ALLOWED * error)

    def check(self, choice: Choice) -> tuple[float, float]:
        """Run a candidate once: its relative L2 error against the oracle, and the call's microseconds.

        Raises:
            Discarded: it raised, or its result is not the convolution's.
        """
        results: list[Tensor] = []
        try:
            call = self.call(choice)
            with warnings.catch_warnings():
                warnings.simplefilter("error", KernelWarning)  # what answers instead is another candidate
                self._spoil()
                taken = self.once_us(lambda: results.append(call()))
                if self.device.type != "cpu":  # the first call compiled a kernel, or had cuDNN try its algorithms
                    taken = self.once_us(call)
        except Exception as failure:  # a candidate may fail in any way: compiler, memory, driver
            raise Discarded(told(failure)) from failure
        result, expected = results[0], _result_shape(self.problem)
        if tuple(result.shape) != expected or result.dtype is not self.problem.torch_dtype:
            raise Discarded(f"gave {result.dtype} {tuple(result.shape)} where {expected} is due", wrong=True)
        error = self._error(result)
        if self.limit < error <= _WRONG * self.limit:
            self._widen()
        if not error <= self.limit:
            text = f"relative error {error:.1e} against the oracle, {self.limit:.1e} allowed"
            raise Discarded(text, wrong=not error <= _WRONG * self.limit)
        if self._baseline is not None:
            # Both are within the limit of the truth where the oracle looked; so they must be everywhere.
            apart = relative_error(result, self._baseline.double())
            if not apart <= 3 * self.limit:
                raise Discarded(f"relative distance {apart:.1e} to native, {3 * self.limit:.1e} allowed", wrong=True)
            worst = self._worst_plane(result) if self.device.type != "cpu" else 0.0  # there, races and stale memory
            if not worst <= _OF_A_PLANE * self.limit:
                text = f"one plane is {worst:.1e} of a plane's norm from native, {_OF_A_PLANE * self.limit:.1e} allowed"
                raise Discarded(text, wrong=True)
        return error, taken

    def _spoil(self) -> None:
        """On a GPU, leave NaN where the allocator keeps what was freed: else a candidate may be handed the last one's
        result, and pass without having written it.
        """
        if self.device.type == "cpu":
            return
        counts = {math.prod(_result_shape(self.problem)), self.a.numel(), self.b.numel()}
        held: list[Tensor] = []  # all at once, or they would be one block
        with contextlib.suppress(torch.OutOfMemoryError):
            for count, dtype in itertools.product(counts, (self.problem.torch_dtype, torch.float32) * 2):
                held.append(torch.full((count,), math.nan, dtype=dtype, device=self.device))

    def _worst_plane(self, result: Tensor) -> float:
        """The largest distance to native in one image and channel (one pair of channels of a weight), as a share of
        what a plane's norm usually is: what is wrong in one place only is lost in the norm of the whole.
        """
        assert self._baseline is not None
        exact = self._baseline if self._baseline.dtype is torch.float64 else self._baseline.float()
        within = tuple(range(2, exact.dim()))
        apart = torch.linalg.vector_norm(exact - result, dim=within)
        usual = torch.linalg.vector_norm(exact, dim=within).square().mean().sqrt()
        return float(apart.max() / usual) if usual > 0 else float(apart.max())

    def _error(self, result: Tensor) -> float:
        part = self._slice
        if self._exact is None:
            a, b = part.operands(self.problem, self.a, self.b)
            bias = self.bias
            if bias is not None:
                bias = taken(taken(bias.reshape(self.problem.groups, -1), 0, part.groups), 1, part.outs).flatten()
            self._exact = reference(part.of(self.problem), a, b, bias)
        return relative_error(part.result(self.problem, result), self._exact)


def _operands(problem: Problem, device: torch.device, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Random operands of unit size, scaled so that results are of unit size too (half precision has a short range)."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(shape: tuple[int, ...], scale: float, memory_format: torch.memory_format) -> Tensor:
        t = torch.randn(shape, generator=generator, device=device, dtype=torch.float32).mul_(scale)
        return t.to(problem.torch_dtype).contiguous(memory_format=memory_format)

    plain = torch.contiguous_format
    ins, outs = problem.c_in // problem.groups, problem.c_out // problem.groups
    live = max(round(problem.taps.density * len(problem.taps)), 1)

    def weight(summed: int) -> Tensor:
        w = normal(problem.weight_shape, (summed * live) ** -0.5, plain)
        if problem.layout != "contiguous":  # a network in channels_last has its weights so, too
            w = w.transpose(1, 2).contiguous().transpose(1, 2)
        if live >= len(problem.taps):
            return w
        ranks = torch.rand(w.shape, generator=generator, device=device).argsort(-1).argsort(-1)
        return w * (ranks < live)  # zeros are skipped by some, at every channel's own places

    # A "mixed" problem has a contiguous input; whatever comes back from its output is in the output's format.
    x_format = problem.memory_format if problem.layout == "channels_last" else plain
    if problem.direction is Direction.FORWARD:
        x, w = normal(problem.input_shape, 1.0, x_format), weight(ins)
        return x, w, normal((problem.c_out,), 1.0, plain) if problem.bias else None
    if problem.direction is Direction.GRAD_INPUT:
        dy = normal(problem.output_shape, 1.0, problem.memory_format)
        return dy, weight(outs), None
    pixels = max(problem.batch * math.prod(problem.out_spatial), 1)
    dy = normal(problem.output_shape, pixels**-0.5, problem.memory_format)
    return normal(problem.input_shape, 1.0, x_format), dy, None


def _result_shape(problem: Problem) -> tuple[int, ...]:
    return {
        Direction.FORWARD: problem.output_shape,
        Direction.GRAD_INPUT: problem.input_shape,
        Direction.GRAD_WEIGHT: problem.weight_shape,
    }[problem.direction]
