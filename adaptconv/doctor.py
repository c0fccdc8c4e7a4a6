"""doctor: what this machine has, and what that means for adaptconv."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata

import torch

from adaptconv import calibration, measure
from adaptconv._version import __version__
from adaptconv.backends import halves
from adaptconv.problem import Device
from adaptconv.records import Store, default_store

_MARKS = {"good": "ok  ", "note": "note", "bad": "!!  "}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found.

    Attributes:
        state: "good", "note" or "bad".
        subject: what was looked at.
        fact: what is there.
        meaning: what follows for the user; "" where nothing does.
    """

    state: str
    subject: str
    fact: str
    meaning: str = ""

    def __str__(self) -> str:
        follows = f"\n       -> {self.meaning}" if self.meaning else ""
        return f"{_MARKS[self.state]} {self.subject}: {self.fact}{follows}"


def examine() -> str:
    """Look at everything; about two seconds, most of it measuring the processor."""
    lines = [f"adaptconv {__version__} on Python {platform.python_version()}, {platform.system()} {platform.machine()}"]
    found = (*_versions(), *_compilers(), *_devices(), *_database(default_store()), _calibration(default_store()))
    lines += [str(finding) for finding in found]
    return "\n".join(lines)


def calibrate(budget_s: float, progress: Callable[[str], None] | None = None) -> tuple[str, bool]:
    """Measure the constants of the cost model for this CPU and keep them where tuning writes.

    Returns:
        The table in words, and whether it was kept.
    """
    outcome = calibration.calibrate(budget_s, progress=progress)
    return str(outcome), outcome.path is not None


def _calibration(store: Store) -> Finding:
    device = Device.of(torch.device("cpu"))
    found = list(store.calibrations(device))
    current = next((calibrated for calibrated in found if calibrated.current), None)
    again = "adaptconv doctor --calibrate measures this CPU, in under 10 s"
    if current is not None:
        made = current.calibration
        return Finding("good", "calibration", f"{current.layer} layer, measured {made.measured_on}: {current.path}")
    if found:
        fact = f"that of the {found[0].layer} layer was measured under another toolchain"
        return Finding("note", "calibration", fact, f"predictions use the shipped defaults; {again}")
    fact = f"none for {device.slug}"
    return Finding("note", "calibration", fact, f"predictions use the shipped defaults; {again}")


def _versions() -> Iterator[Finding]:
    yield Finding("good", "torch", str(torch.__version__))
    try:
        yield Finding("good", "optuna", metadata.version("optuna"))
    except metadata.PackageNotFoundError:
        yield Finding("bad", "optuna", "not installed", "adaptconv.tune cannot run: pip install optuna")
    try:
        yield Finding("good", "triton", metadata.version("triton"))
    except metadata.PackageNotFoundError:
        yield Finding(
            "note", "triton", "not installed", "a GPU needs it, for torch.compile and kernels; a CPU does not"
        )


def _compilers() -> Iterator[Finding]:
    from torch._inductor import cpp_builder, exc

    try:
        yield Finding("good", "C++ compiler", str(cpp_builder.get_cpp_compiler()))
    except (exc.InvalidCxxCompiler, RuntimeError):
        yield Finding(
            "bad", "C++ compiler", "none found",
            "adaptconv.optimize still rewrites models on the CPU but runs them uncompiled; install g++ or clang++",
        )  # fmt: skip


def _devices() -> Iterator[Finding]:
    limits = measure.machine_limits(torch.device("cpu"), budget_s=1.0)
    speed = f"copies {limits['copy_gb_s']:.0f} GB/s, multiplies {limits['gemm_gflop_s']:.0f} GFLOP/s in float32"
    device = Device.of(torch.device("cpu"))
    yield Finding("good", "CPU", f"{device}; {speed}", f"records for it are kept under '{device.slug}'")
    yield _half_precision()
    if not torch.cuda.is_available():
        yield Finding("note", "GPU", "none that torch can use", "everything runs on the CPU")
    for index in range(torch.cuda.device_count()):
        gpu = Device.of(torch.device("cuda", index))
        yield Finding("good", f"GPU {index}", str(gpu), f"records for it are kept under '{gpu.slug}'")


def _half_precision() -> Finding:
    missing = [dtype for dtype in halves.HALVES if not halves.has_kernels(dtype)]
    if missing:
        fact = f"torch has no kernels for {' and '.join(missing)} on this processor"
        return Finding("note", "half precision", fact, "its loops are slow: convolutions are computed in float32")
    fact = "torch has kernels for bfloat16, and for float16 but not for its weight gradients"
    return Finding("good", "half precision", fact, "where it has none, convolutions are computed in float32")


def _database(store: Store) -> Iterator[Finding]:
    counts: dict[str, int] = {}
    for hit in store.records():
        counts[hit.layer] = counts.get(hit.layer, 0) + 1
    for layer in store.layers:
        where = "not set" if layer.root is None else str(layer.root)
        held = counts.get(layer.name, 0)
        yield Finding("good" if held else "note", f"database, {layer.name} layer", f"{where}: {held} records")
    if not counts:
        yield Finding("note", "database", "empty", "dispatch predicts instead of remembering: run adaptconv tune once")
    target = store.target
    if target is None:
        yield Finding(
            "bad", "tuning writes to", "nowhere: HOME and XDG_CACHE_HOME are not set", "set one, or ADAPTCONV_DB"
        )
        return
    nearest = target
    while not nearest.exists():
        nearest = nearest.parent
    writable = os.access(nearest, os.W_OK | os.X_OK) and nearest.is_dir()
    meaning = "" if writable else "tuning results will not be kept: set ADAPTCONV_DB to a folder of yours"
    yield Finding(
        "good" if writable else "bad", "tuning writes to", f"{target}{'' if writable else ' (not writable)'}", meaning
    )
