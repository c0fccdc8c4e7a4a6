"""A model whose plans are all native against plain ``torch.compile``: the code Inductor generates, and its time."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import adaptconv
from adaptconv import measure
from adaptconv.records import use_database
from benchmarks.compiled.check import results_of
from benchmarks.compiled.forced import native_ways, problems_of, write_database
from benchmarks.compiled.models import MODELS

Answer = dict[str, Any]
_CPU = torch.device("cpu")
_COMMENT = re.compile(r"\s*(#|//).*|\s*|AOT ID.*")


def run(name: str, seconds: float) -> Answer:
    """Compile a model plainly and with every plan native, in one process and on one set of parameters.

    Args:
        name: of the model.
        seconds: of timing, forward and training each.

    Returns:
        For "forward" and "training": "pinned" and "records", how the generated code differs from plain torch.compile's
        ("" where it does not) when native is pinned and when records name it; "times_us", 20th percentiles of plain, of
        plain a second time and of ours (the records'); "rounds".
    """
    warnings.filterwarnings(
        "ignore", message="adaptconv left", category=RuntimeWarning
    )  # native takes no union of taps
    model = MODELS[name]
    module, x = model.build()
    answer: Answer = {"model": name}
    with TemporaryDirectory() as folder:
        write_database(Path(folder), problems_of(module.train(), [x]), native_ways)
        torch._dynamo.reset()
        for what in ("forward", "training"):
            answer[what] = _compared(module, x, Path(folder), seconds, train=what == "training")
    return answer


def _compared(module: nn.Module, x: Tensor, folder: Path, seconds: float, *, train: bool) -> Answer:
    module.train(train)
    ways: dict[str, tuple[Callable[[nn.Module], Any], AbstractContextManager[Any]]] = {
        "plain": (torch.compile, nullcontext()),
        "again": (torch.compile, nullcontext()),
        "pinned": (adaptconv.optimize, adaptconv.pinned("native")),
        "records": (adaptconv.optimize, _database(folder)),
    }
    codes: dict[str, list[str]] = {}
    calls: dict[str, Callable[[], object]] = {}
    for way, (compiler, setting) in ways.items():
        call = compiler(_Entry(module))
        with setting, generated_code() as codes[way]:
            results_of(call, module, x, train=train)
        calls[way] = _Timed(call, module, x, train=train)
    answer: Answer = {way: difference(codes["plain"], codes[way]) for way in ("again", "pinned", "records")}
    with nullcontext() if train else torch.no_grad(), _database(folder):
        timed = {way: calls[way] for way in ("plain", "again", "records")}
        timings = measure.interleave(timed, budget_s=seconds, device=_CPU, min_rounds=20, max_rounds=2000, warmup=3)
    answer["times_us"] = {way: timing.p20_us for way, timing in timings.items()}
    answer["rounds"] = timings["plain"].rounds
    return answer


class _Entry(nn.Module):
    """A model behind a ``forward`` of its own.

    Dynamo keeps what it compiled by the code it compiled: two ways to compile one model would stand in one list, and
    the second would be looked for behind the first at every call.
    """

    def __new__(cls, module: nn.Module) -> _Entry:
        def forward(self: _Entry, x: Tensor) -> Tensor:
            answer: Tensor = self.model(x)
            return answer

        forward.__code__ = forward.__code__.replace()  # equal, but another
        return super().__new__(type("Entry", (cls,), {"forward": forward}))

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module


class _Timed:
    """A forward pass, or a forward and a backward one."""

    def __init__(self, call: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, *, train: bool) -> None:
        self.call, self.module, self.x = call, module, x
        self.cotangent = torch.ones_like(call(x)) if train else None

    def __call__(self) -> None:
        """Run once."""
        output = self.call(self.x)
        if self.cotangent is not None:
            output.backward(self.cotangent)
            self.module.zero_grad()


@contextmanager
def _database(folder: Path) -> Iterator[None]:
    use_database(folder)
    try:
        yield
    finally:
        use_database(None)


@contextmanager
def generated_code() -> Iterator[list[str]]:
    """The Python and C++ that Inductor generates inside, a text a graph; its caches would leave nothing to generate."""
    from torch._inductor.graph import GraphLowering

    sources: list[str] = []
    with (
        mock.patch.object(GraphLowering, "save_output_code", sources.append),
        torch._inductor.config.patch(fx_graph_cache=False),
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield sources


def difference(plain: list[str], ours: list[str]) -> str:
    """The first lines in which two lists of generated code differ, comments aside; "" where they do not."""
    if len(plain) != len(ours):
        return f"{len(plain)} graphs in plain torch.compile, {len(ours)} in optimize"
    for left, right in zip(plain, ours, strict=True):
        before, after = ([line for line in text.splitlines() if not _COMMENT.fullmatch(line)] for text in (left, right))
        lines = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[:2] not in ("--", "++")]
        if lines:
            return "\n".join(lines[:6])
    return ""
