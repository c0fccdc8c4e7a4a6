"""depthwise: depthwise convolution tap by tap in Triton, from packed rows or straight from the operands."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import ClassVar

import torch

from adaptconv.backends.base import Config, Knob, Space, Value
from adaptconv.backends.triton.base import TritonBackend
from adaptconv.backends.triton.depthwise.plan import SECTIONS, STRIP, Pass, images, packing, passes
from adaptconv.backends.triton.depthwise.shapes import direct_shape, is_packed, packed_shape, shares
from adaptconv.backends.triton.hardware import card
from adaptconv.problem import Direction, Problem

_CONTIGUOUS = torch.contiguous_format
_DTYPES = ("bfloat16", "float16", "float32")
_TINY = 1 << 22  # multiply-adds under which launches are all that is measured
_FEW = 64  # taps of a tiny problem that are loaded straight
_SPACE = 16  # most that packing may enlarge an operand
_LAUNCH_US = 2.5  # of one kernel of several in a row
_FILLED = 0.75  # share of cycles that the loops are assumed to fill; not measured on a GPU yet
_WARPS = 16  # a multiprocessor's warps from which that share holds


class Depthwise(TritonBackend):
    """Multiply-adds of the live taps alone, at any offsets and steps, one input channel a group, sums in float32.

    Four forms. ``packed8`` and ``packed16`` copy the operand's rows once with their zeros (and, for a dilation or a
    step along the rows, sort them into phases), so that threads compute strips of eight neighbours from aligned loads,
    shifting in registers: 1.3 instructions a multiply-add for dense rows of taps. ``images`` packs eight images
    instead: 2.4 a multiply-add at any offsets. ``direct`` copies nothing and checks every load: for few taps, and for
    channels_last, where eight channels share a load.
    """

    name: ClassVar[str] = "depthwise"
    version: ClassVar[int] = 1
    summary: ClassVar[str] = "depthwise by taps on the vector units, from packed rows or straight, in Triton"

    def unsuited(self, problem: Problem) -> str | None:
        """Declines other groups, dtypes and footprints, and single images past 32-bit offsets."""
        if problem.dtype not in _DTYPES:
            return f"it has no kernel for {problem.dtype}"
        if problem.groups != problem.c_in:
            return f"it takes one input channel a group, not {problem.c_in // problem.groups}"
        if problem.taps.footprint is not None:
            return "its taps carry a footprint"
        places = max(math.prod(problem.spatial), math.prod(problem.out_spatial))
        if problem.batch * places >= 1 << 30:
            return "a channel of the whole batch has 2^30 places or more, past its 32-bit counters"
        if problem.memory_format is not _CONTIGUOUS and places * problem.c_out >= 1 << 31:
            return "one image has 2^31 elements or more, past its 32-bit distances"
        return None

    def space(self, problem: Problem) -> Space:
        """Form, and the size of what a program takes on."""
        return _space(problem)

    def predicted_us(self, problem: Problem, config: Config) -> float:
        """Instructions counted in the compiled loops, or traffic, and launches."""
        return _predicted(problem, config)


def _forms(problem: Problem) -> tuple[str, ...]:
    """Packing needs taps, and must not enlarge a large operand beyond reason; strips of images need images."""
    tapped = [here for here in passes(problem) if here.taps]
    if not tapped:
        return ("direct",)
    if problem.flops < 2 * _TINY:  # fewest launches, unless that is very many loads
        return ("direct",) if max(len(here.taps) for here in tapped) <= _FEW else ("packed8",)
    forms, read = [], _channels(problem)[0]
    size = max(problem.batch * read * math.prod(here.size) for here in tapped)
    if max(problem.batch * read * packing(here).volume * STRIP for here in tapped) <= max(_SPACE * size, 1 << 24):
        forms += ["packed8", "packed16"]
    if problem.batch > 1 and problem.memory_format is _CONTIGUOUS:
        groups = math.ceil(problem.batch / STRIP)
        if max(groups * read * images(here).volume * STRIP for here in tapped) <= max(_SPACE * size, 1 << 24):
            forms.append("images")
    return (*forms, "direct")


def _channels(problem: Problem) -> tuple[int, int]:
    """Of the operand that is packed, and of what is computed."""
    adjoint = problem.direction is Direction.GRAD_INPUT
    return (problem.c_out, problem.c_in) if adjoint else (problem.c_in, problem.c_out)


@lru_cache(maxsize=4096)
def _space(problem: Problem) -> Space:
    """The declared knobs; the default is the form, and the sizes, that are predicted to take least."""
    forms = _forms(problem)
    knobs = [Knob("form", forms, forms[-1], "strips along rows (taps from one read) or over images, or direct")]
    weights = problem.direction is Direction.GRAD_WEIGHT
    if problem.flops < 2 * _TINY:
        knobs.append(Knob("warps", (4,), 4, "warps of a program"))
        if weights:
            knobs.append(Knob("groups", (8,), 8, "groups of taps summed from one read of dy"))
            knobs.append(Knob("splits", (8,), 8, "partial sums of a weight's gradient"))
        return Space(tuple(knobs))
    knobs.append(Knob("warps", (4, 8), 4, "warps of a program"))
    if weights:
        knobs.append(Knob("groups", (1, 2, 4), 4, "groups of taps summed from one read of dy"))
        knobs.append(Knob("splits", (1, 4, 16, 64, 256), 16, "partial sums of a weight's gradient"))
    else:
        knobs.append(
            Knob(
                "share",
                shares(card(problem.device).family),
                2,
                "strips, places or vectors of channels a thread computes",
            )
        )
    space = Space(tuple(knobs))
    best = min(space, key=lambda config: _predicted(problem, config))
    return Space(tuple(Knob(k.name, k.values, _same(k, best), k.help) for k in knobs))


def _same(knob: Knob, config: Config) -> Value:
    return config[knob.name]


@lru_cache(maxsize=65536)
def _predicted(problem: Problem, config: Config) -> float:
    facts = card(problem.device)
    cycles_a_us = facts.processors * facts.clock_ghz * 1e3 * _FILLED
    time = 0.0
    for here in passes(problem):
        count = _packed_counts if is_packed(config) and here.taps else _direct_counts
        cycles, elements, launches, programs = count(problem, config, here)
        # A multiprocessor with less than its share of warps cannot hide what it waits for.
        share = programs * int(config["warps"]) / (facts.processors * _WARPS)
        moving = elements * problem.torch_dtype.itemsize / facts.bandwidth_gb_s * 1e-3
        time += max(cycles / cycles_a_us / min(share, 1.0), moving) + launches * _LAUNCH_US
    return time


_Counts = tuple[float, float, int, int]
"""Cycles of all multiprocessors, elements moved, launches, programs."""


def _packed_counts(problem: Problem, config: Config, here: Pass) -> _Counts:
    """Of one pass that packs its operand; cycles are issue slots by four, or lines read from the first cache."""
    weights, shape = problem.direction is Direction.GRAD_WEIGHT, packed_shape(config)
    rows = images(here) if shape.reach == 1 else packing(here, reach=shape.reach, lone=not weights)
    read, made = _channels(problem)
    repeats = math.ceil(problem.batch / STRIP) if rows.images else problem.batch
    outer = repeats * here.count[0] * here.count[1] * rows.lanes
    blocks = math.ceil(outer / shape.strips)
    warps = blocks * shape.strips / 32
    enlarged = repeats * rows.volume * STRIP * read
    elements = problem.batch * read * math.prod(here.size) + 2.0 * enlarged
    result = problem.batch * made * math.prod(here.count)
    copying = 8 * enlarged / 128
    size = problem.torch_dtype.itemsize
    vector, widening = 2 * size, size < 4  # cycles the first cache takes for a strip of every lane
    if not weights:
        wide, narrow, aligned, others = rows.sections
        share = int(config.get("share", 1))
        each = 0.0
        for count, strips, taps in ((wide, 3, 16), (narrow, 2, 8), (aligned, 1, 1), (others, 2, 1)):
            values = 8 * (strips if taps > 1 else 1) if widening else 0
            slots = 8 * taps + values + 2 * strips + (taps + 10) / share
            each += count * max(slots / 4, strips * vector + (taps + 2) / share)
        each = each * (problem.c_out // problem.groups if problem.direction is Direction.GRAD_INPUT else 1) + 25
        # Eight results of a strip that are no neighbours are written apart, a sector each.
        apart = 8 if rows.spread * here.skip[2] > 1 or problem.memory_format is not _CONTIGUOUS else 1
        return copying + made * warps * each, elements + apart * result, 4, made * blocks
    entries, taps, strips = len(rows.table) - SECTIONS, max(shape.reach, 1), shape.reach // STRIP + 1
    programs = math.ceil(entries / shape.groups)
    splits = min(int(config["splits"]), blocks)
    slots = shape.groups * (8 * taps + (8 * strips if widening else 0) + 3 * strips) + 25
    each = max(slots / 4, (shape.groups * strips + 1) * vector + 2)
    looped = made * programs * math.ceil(blocks / splits) * splits * shape.strips / 32 * each
    ends = made * programs * splits * shape.warps * shape.groups * taps * 8.0
    elements += result + 2.0 * outer * STRIP * made + 4.0 * splits * made * entries * taps
    return copying + looped + ends, elements, 6, made * programs * splits


def _direct_counts(problem: Problem, config: Config, here: Pass) -> _Counts:
    """What one pass takes straight from the operands."""
    last = problem.memory_format is not _CONTIGUOUS
    read, made = _channels(problem)
    multiple, size = problem.c_out // problem.groups, problem.torch_dtype.itemsize
    unit = math.gcd(16 // size, made) if last and multiple == 1 else 1
    places = problem.batch * math.prod(here.count)
    shape = direct_shape(config, last=last, channels=made, unit=unit, places=places)
    blocks, across = math.ceil(places / shape.places), math.ceil(made / shape.channels)
    vectors = shape.places * shape.channels / unit / 32  # of a tile, by warps
    elements = problem.batch * math.prod(here.size) * read + places * made
    tap = 4.0 + 2.5 * problem.axes + (2 if size < 4 else 1) * unit
    if problem.direction is not Direction.GRAD_WEIGHT:
        share = int(config.get("share", 1))
        each = len(here.taps) * (tap + (unit / 4 + 14) / share) * (multiple if read > made else 1) + 80
        return blocks * across * vectors * each / 4, elements, 3, blocks * across
    programs = math.ceil(len(here.taps) / shape.taps)
    splits = min(int(config["splits"]), blocks)
    looped = math.ceil(blocks / splits) * splits * across * vectors * programs * (shape.taps * tap + 45 + unit) / 4
    ends = programs * splits * across * vectors * shape.taps * unit * 4.0
    again = 1 + 0.15 * (programs - 1)  # most of the later reads find the second-level cache
    return looped + ends, elements * again + 4.0 * splits * made * len(here.taps), 4, programs * splits * across
