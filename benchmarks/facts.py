"""What a results file says of the machine that made it, and how such a file is written and added to."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from adaptconv import __version__
from adaptconv.measure import machine_limits
from adaptconv.problem import Device
from adaptconv.records import toolchain

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def machine_facts(device: torch.device) -> dict[str, object]:
    """Device, limits measured now, threads, versions and date."""
    return {
        "device": str(Device.of(device)),
        "slug": Device.of(device).slug,
        "limits": machine_limits(device),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "toolchain": toolchain(device),
        "adaptconv": __version__,
        "measured_on": now(),
    }


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed, as tcmalloc and jemalloc do; False where it cannot be told to.

    By default glibc gives large blocks back to the system and asks for them anew, page by page. Where a page fault is
    dear (a virtual machine), that costs several times what a layer does, and whether it happens at all depends on what
    a process has allocated before: two equal calls then differ several times over, and both for no reason of theirs.
    """
    try:
        libc = ctypes.CDLL(None)
        return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, -1))
    except (OSError, AttributeError):
        return False


def must_keep_freed_memory() -> None:
    """``keep_freed_memory``, for who asked for it by ``--keep-memory``.

    Raises:
        SystemExit: this system cannot.
    """
    if not keep_freed_memory():
        raise SystemExit("--keep-memory: this system's C library cannot be told to; leave it out")


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def write_results(
    path: Path, device: torch.device, *, facts: Mapping[str, object] | None = None, **content: object
) -> None:
    """Write a results file: the machine's facts, and what was measured.

    The file is replaced as a whole: a run cut off while it writes keeps what was there.

    Args:
        path: JSON to write; its folder is made.
        device: whose facts to give.
        facts: those facts, where they were taken before; None takes them now, which costs a second.
        content: what else the file holds.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    machine = machine_facts(device) if facts is None else facts
    part.write_text(json.dumps({"machine": machine, **content}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none if there is no file.

    Raises:
        ValueError: the file is there and is not a results file.
    """
    if not path.exists():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    rows = content.get("rows") if isinstance(content, dict) else None
    if not isinstance(rows, list):
        raise ValueError(f"{path} has no 'rows': it is no results file; name another with --out")
    return rows


def merged(
    old: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], key: Callable[[dict[str, Any]], object]
) -> list[dict[str, Any]]:
    """Old rows in their order, each replaced where there is a new one of its key, then the other new rows."""
    fresh = {key(row): row for row in new}
    kept = [fresh.pop(key(row), row) for row in old]
    return kept + list(fresh.values())
