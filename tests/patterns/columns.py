"""The columns of the table of patterns: each says what is wrong with a pattern, or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from adaptconv.compile.judging import SiteReport
from adaptconv.compile.optimize import collect_sites
from adaptconv.problem import Padding
from adaptconv.taps import TapPattern
from tests.compared import Answer, answer, built, optimized, uncompiled
from tests.patterns.base import Pattern

_FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}
_TIMES = 4.0  # the error allowed, in multiples of torch's own distance from float64
_LEAST = {torch.float32: 3e-6, torch.bfloat16: 1e-2}  # and what is allowed in any case, relative to the largest value


def recognised(pattern: Pattern) -> str:
    """Whether a dry run finds the site for what it is; that it is then rewritten, the other columns check."""
    sites = collect_sites(built(pattern.make), pattern.inputs(pattern.shapes[0])[:1], train=True)
    found = [f"{s.kind} {s.taps} padded {s.padding} made {s.made!r} note {s.note!r} {s.reason}" for s in sites]
    if pattern.taps is None:
        return "" if any(pattern.note in f"{s.kind} {s.reason} {s.note}".lower() for s in sites) else f"only {found}"
    alike = [
        s for s in sites
        if s.kind == pattern.kind and s.taps is not None
        and reads(s.taps, s.padding) == reads(pattern.taps, pattern.padding)
        and pattern.made in (None, bool(s.made)) and pattern.note in s.note.lower()
    ]  # fmt: skip
    return "" if alike else f"not found among {found}"


def reads(taps: TapPattern, padding: Padding) -> tuple[Any, ...]:
    """Which inputs an output reads, counted from itself, and how many outputs there are: equal for equal sites.

    A window may have borders without taps, which padding takes back.
    """
    moved = tuple(tuple(o - before for o, (before, _) in zip(t, padding, strict=True)) for t in taps.offsets)
    extents = tuple(w - sum(zeros) for w, zeros in zip(taps.window, padding, strict=True))
    return moved, extents, taps.footprint


def forward(pattern: Pattern) -> str:
    """Outputs of inference."""
    return _compared(pattern, pattern.shapes[0], train=False)


def gradients(pattern: Pattern) -> str:
    """Outputs and gradients of training."""
    return _compared(pattern, pattern.shapes[0], train=True)


def dynamic(pattern: Pattern) -> str:
    """Two sizes through one graph."""
    xs = [pattern.inputs(shape)[i] for i, shape in enumerate(pattern.shapes)]
    with uncompiled():
        given, reports, graphs = optimized(pattern.make, xs, pattern.pin, train=True, dynamic=True, fullgraph=True)
    if graphs != 1:
        return f"{graphs} graphs for two sizes"
    if not _rewritten(pattern, reports):
        return f"not rewritten: {[(r.kind, r.reason) for r in reports]}"
    return _far(pattern, xs, given, torch.float32)


def autocast(pattern: Pattern) -> str:
    """Outputs, their dtype and strides, and gradients, under autocast to bfloat16."""
    return _compared(pattern, pattern.shapes[0], train=True, under=_autocast)


def channels_last(pattern: Pattern) -> str:
    """Outputs, their strides, and gradients, of an input in channels_last; 1-D has no such thing."""
    if pattern.axes == 1:
        return ""
    return _compared(pattern, pattern.shapes[0], train=True, memory_format=_FORMATS[pattern.axes])


COLUMNS: dict[str, Callable[[Pattern], str]] = {
    "recognised": recognised, "forward": forward, "gradients": gradients, "dynamic shapes": dynamic,
    "autocast": autocast, "channels_last": channels_last,
}  # fmt: skip


def compiled(pattern: Pattern) -> str:
    """Outputs and gradients of training, through Inductor; no column, for it takes seconds."""
    xs = pattern.inputs(pattern.shapes[0])
    given, _, _ = optimized(pattern.make, xs, pattern.pin, train=True, fullgraph=True)
    return _far(pattern, xs, given, torch.float32)


# ---- comparing ------------------------------------------------------------------------------------------


@contextmanager
def _autocast() -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _rewritten(pattern: Pattern, reports: Sequence[SiteReport]) -> bool:
    """Whether our call took the site's place, where it should."""
    if pattern.taps is None:
        return not any(r.rewritten for r in reports)
    return any(r.rewritten and r.kind == pattern.kind for r in reports)


def _compared(
    pattern: Pattern, shape: Sequence[int], *, train: bool, under: Callable[[], Any] = _nothing,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> str:  # fmt: skip
    xs = [x.contiguous(memory_format=memory_format) for x in pattern.inputs(shape)]
    with uncompiled(), under():
        given, reports, _ = optimized(pattern.make, xs, pattern.pin, train=train, fullgraph=True)
    if not _rewritten(pattern, reports):
        return f"not rewritten: {[(r.kind, r.reason) for r in reports]}"
    return _far(pattern, xs, given, torch.bfloat16 if under is _autocast else torch.float32, under)


def _far(
    pattern: Pattern, xs: Sequence[Tensor], given: Answer, precision: torch.dtype, under: Callable[[], Any] = _nothing
) -> str:
    """What is further from float64 than torch itself is, or of another shape, dtype or memory format; or ""."""
    model = built(pattern.make)
    train = bool(given.gradients)
    with under():
        plain = answer(model, model, xs, train=train)
    truth = _truth(pattern.make, xs, train)
    for what in ("outputs", "gradients", "state"):
        ours, theirs, right = getattr(given, what), getattr(plain, what), getattr(truth, what)
        if not len(ours) == len(theirs) == len(right):
            return f"{len(ours)} {what} instead of {len(theirs)}"
        for i, (a, b, exact) in enumerate(zip(ours, theirs, right, strict=True)):
            if (a is None, b is None, exact is None) != (a is None,) * 3:
                return f"{what}[{i}]: one is None, the other is not"
            if a is None or b is None or exact is None:
                continue
            if (a.shape, a.dtype) != (b.shape, b.dtype) or (what == "outputs" and a.stride() != b.stride()):
                return f"{what}[{i}]: {a.shape} {a.stride()} {a.dtype}, not {b.shape} {b.stride()} {b.dtype}"
            scale = max(float(exact.abs().max()), 1e-30)
            mine, native = (float((t.double() - exact).abs().max()) / scale for t in (a, b))
            least = _LEAST[torch.bfloat16 if a.dtype is torch.bfloat16 else precision]
            if not mine <= max(_TIMES * native, least):
                return f"{what}[{i}]: relative error {mine:.2g}, torch's own is {native:.2g}"
    return ""


def _truth(make: Callable[[], nn.Module], xs: Sequence[Tensor], train: bool) -> Answer:
    """The answer of the same model in float64, the constants that it makes included."""
    model = built(make).double()
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return answer(model, model, [x.double() for x in xs], train=train)
    finally:
        torch.set_default_dtype(before)
