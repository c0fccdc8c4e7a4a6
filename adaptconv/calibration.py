"""Calibration: the constants of the cost model, measured on the device that is here.

A constant is not what a data sheet calls it but what makes its formula right: each has a probe, a convolution
whose prediction it governs, and is the value at which the backend's own ``cost`` equals the time measured; the
geometric mean, where several probes span what it stands for. The probes stand in such an order that the other
large terms of a formula are known when it is solved, and a few sweeps settle the small ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, process_time

import torch
from torch import Tensor

from adaptconv import measure, records
from adaptconv.backends import backend_named, costs
from adaptconv.probes import Probe, probes
from adaptconv.problem import Device
from adaptconv.rates import DEFAULTS, Rates, is_overhead, unit
from adaptconv.records import Calibration, DatabaseError

CPU = torch.device("cpu")
_PASSES = 3  # over all probes, of which the fastest sample counts: a neighbour may disturb one, seldom all
_UNSTEADY = 2.0  # a pass whose median is so many times the fastest sample was disturbed
_SHAKY = " (unsteady)"
_PARALLEL = ("gemm_gflops", "slow_gflops")  # what keeps every thread of torch at work
_CORES = 0.8  # processors a thread that such a probe must get: who shares one waits as steadily as he works
_CROWDED = " (short of processors)"
_BUSY = 0.25  # share of unsteady probes from which the machine is too busy for what it gave to be kept
_SWEEPS = 4  # each solves every constant with the others as they are: terms that a later one sets are small
_COPY_BYTES = 8 << 20  # about the input of one layer: what the model moves is seldom larger
_MOVED = {"copy_gbytes": "a copy of 8 MiB", "columns_gbytes": "49 shifted views of one image, stacked"}
_LEFT = 0.05  # least share of the measured time that a constant must answer for: the rest of a formula can be too slow

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Measured:
    """One constant.

    Attributes:
        constant: a field of ``Rates``.
        value: what was found; the default where nothing was.
        what: on what it was measured, or why it was not, a line each.
    """

    constant: str
    value: float
    what: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What ``calibrate`` found, and where it is kept.

    Attributes:
        calibration: the constants.
        rows: how each came about.
        seconds: time it took.
        path: the file; None where it was not kept.
        reason: why not; "" where it was.
    """

    calibration: Calibration
    rows: tuple[Measured, ...]
    seconds: float
    path: Path | None
    reason: str

    def __str__(self) -> str:
        """A table of the constants, and where they went."""
        lines = [f"{'constant':18} {'default':>8} {'here':>8}  {'unit':17} measured on"]
        for row in self.rows:
            default = getattr(DEFAULTS, row.constant)
            lines.append(f"{row.constant:18} {default:8.4g} {row.value:8.4g}  {unit(row.constant):17} {row.what[0]}")
            lines += [f"{'':56}{more}" for more in row.what[1:]]
        lines.append(f"{self.calibration.device}, in {self.seconds:.1f} s")
        lines.append(f"kept in {self.path}, in force from now on" if self.path else f"not kept: {self.reason}")
        return "\n".join(lines)


def calibrate(budget_s: float = 6.0, *, keep: bool = True, progress: Progress | None = None) -> Outcome:
    """Measure the constants of the cost model on this CPU, at the number of threads torch has now.

    Every convolution without a record of its own is then predicted with them, in this process at once and in
    later ones, until torch moves to another minor version. Building the C++ kernel, where that is still to be
    done, comes on top of the budget.

    Args:
        budget_s: seconds to spend measuring.
        keep: write the result to the layer of the database that tuning writes to.
        progress: called with a line before each step.

    Raises:
        ValueError: a negative budget.
    """
    if not budget_s >= 0:
        raise ValueError(f"calibrate needs a budget of at least 0 seconds, got {budget_s}")
    start = perf_counter()
    device = Device.of(CPU)
    with torch.no_grad():
        times, notes = _times(probes(device), budget_s, progress or (lambda line: None))
        moved = {"copy_gbytes": _copy_gbytes(budget_s / 20), "columns_gbytes": _columns_gbytes(budget_s / 20)}
    rates, rows = _fitted(device, moved, times, notes)
    calibration = Calibration(device.slug, rates, records.toolchain(CPU), records.utc_now())
    unsteady = sum(note == _SHAKY for note in notes.values())
    crowded = _CROWDED in notes.values()
    if not keep:
        path, reason = None, "it was not asked for"
    elif crowded or unsteady > _BUSY * len(times):
        what = f"torch's {device.threads} threads did not have a processor each" if crowded else "times were unsteady"
        path, reason = None, f"{what}; run it again on a quieter machine, or with fewer threads"
    else:
        path, reason = _kept(calibration)
    return Outcome(calibration, tuple(rows), perf_counter() - start, path, reason)


def _fitted(
    device: Device, moved: dict[str, float], times: dict[Probe, float], notes: dict[Probe, str]
) -> tuple[Rates, list[Measured]]:
    """The constants that explain the times, and how each came about."""
    rates = DEFAULTS
    rows: list[Measured] = []
    for constant, value in moved.items():
        rates = replace(rates, **_within(constant, value))
        rows.append(Measured(constant, getattr(rates, constant), (_MOVED[constant],)))
    groups = {c: tuple(g) for c, g in itertools.groupby(probes(device), key=lambda probe: probe.constant)}
    found: dict[str, dict[str, float]] = {}
    for _ in range(_SWEEPS):
        for constant, tried in groups.items():
            values = [solved(p, rates, times[p]) if p in times else None for p in tried]
            found[constant] = _within(constant, _mean(values))
            rates = replace(rates, **found[constant])
    for constant, tried in groups.items():
        what = [f"{p.what}{f', {times[p]:,.0f} us' if p in times else ''}{notes.get(p, '')}" for p in tried]
        if not found[constant] and tried[0] in times:
            what[0] += ": no sound value, the default stands"
        rows.append(Measured(constant, getattr(rates, constant), tuple(what)))
    return rates, rows


def solved(probe: Probe, rates: Rates, measured_us: float) -> float | None:
    """The value of a probe's constant at which its prediction is the time measured, all others as given.

    A prediction is ``rest + term`` with the term proportional to the constant, or to one over it for a rate: two
    predictions give both parts.

    Returns:
        The value; where ``rest`` alone predicts the whole time or more, the one whose term is a twentieth of it.
        None where the constant does not enter the prediction.
    """
    backend, config = backend_named(probe.backend), probe.config
    base: float = getattr(DEFAULTS, probe.constant)

    def predicted(value: float) -> float:
        with costs.assuming(replace(rates, **{probe.constant: value})):
            return backend.cost(probe.problem, config)

    once, twice = predicted(base), predicted(2 * base)
    term = twice - once if is_overhead(probe.constant) else 2 * (once - twice)
    if term <= 1e-9 * once:
        return None
    left = max(measured_us - (once - term), _LEFT * measured_us)
    return base * left / term if is_overhead(probe.constant) else base * term / left


def _mean(values: Sequence[float | None]) -> float | None:
    """The geometric mean, if there is nothing but numbers."""
    logs = [math.log(value) for value in values if value is not None]
    return math.exp(math.fsum(logs) / len(logs)) if len(logs) == len(values) else None


def _within(name: str, value: float | None) -> dict[str, float]:
    """A constant to replace, if it is one that ``Rates`` takes."""
    try:
        return {} if value is None else {name: getattr(Rates(**{name: value}), name)}
    except ValueError:
        return {}


def _times(wanted: Sequence[Probe], budget_s: float, tell: Progress) -> tuple[dict[Probe, float], dict[Probe, str]]:
    """Time of every probe in microseconds, and what there is to say: why there is none, or that it is unsteady."""
    calls: dict[Probe, Callable[[], Tensor]] = {}
    notes: dict[Probe, str] = {}
    for probe in wanted:
        backend = backend_named(probe.backend)
        note = backend.rejects(probe.problem)
        if note is None:
            if probe.constant == "cpp_call_us":
                tell("calling the C++ kernel, which is built now if it never was")
            calls[probe] = probe.call()
            calls[probe]()
            note = backend.rejects(probe.problem)  # a kernel that could not be built was stood in for
        if note is not None:
            calls.pop(probe, None)
            notes[probe] = f": not measured, {note[:60]}"
    share = budget_s / (_PASSES * max(len(calls), 1))
    taken: dict[Probe, list[tuple[measure.Timing, float]]] = {probe: [] for probe in calls}
    deadline = perf_counter() + budget_s
    for turn in range(_PASSES):
        for probe, call in calls.items():
            if turn and perf_counter() > deadline:  # each is measured once, however busy the machine
                break
            tell(f"pass {turn + 1} of {_PASSES}: {probe.constant}, {probe.what}")
            taken[probe].append(_timed(call, share))
    times = {probe: min(timing.min_us for timing, _ in passes) for probe, passes in taken.items()}
    for probe, passes in taken.items():
        if probe.constant in _PARALLEL and max(cores for _, cores in passes) < _CORES * probe.problem.device.threads:
            notes[probe] = _CROWDED
        elif max(timing.median_us for timing, _ in passes) > _UNSTEADY * times[probe]:
            notes[probe] = _SHAKY
    return times, notes


def _timed(call: Callable[[], Tensor], budget_s: float) -> tuple[measure.Timing, float]:
    """How long a call takes, and how many processors this process had meanwhile."""
    start, worked = perf_counter(), process_time()
    timing = measure.interleave({"": call}, budget_s=budget_s, device=CPU, min_rounds=3, max_rounds=500)[""]
    return timing, (process_time() - worked) / (perf_counter() - start)


def _copy_gbytes(budget_s: float) -> float:
    source = torch.ones(_COPY_BYTES // 4)
    target = torch.empty_like(source)
    return 2 * _COPY_BYTES / _timed(lambda: target.copy_(source), budget_s)[0].min_us * 1e-3


def _columns_gbytes(budget_s: float) -> float:
    """Each of 49 taps' views of a padded image, written side by side: 27 MiB, as much as gather keeps at once."""
    image = torch.ones(1, 64, 58, 74)
    views = [image[:, :, i : i + 40, j : j + 56] for i in range(0, 19, 3) for j in range(0, 19, 3)]
    moved = 2 * 4 * len(views) * views[0].numel()
    return moved / _timed(lambda: torch.stack(views, 2), budget_s)[0].min_us * 1e-3


def _kept(calibration: Calibration) -> tuple[Path | None, str]:
    try:
        return records.default_store().write_calibration(calibration), ""
    except DatabaseError as error:
        return None, str(error)
