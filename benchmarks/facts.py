"""What a results file says of the machine that made it."""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime, timezone
from pathlib import Path

import torch

from adaptconv import __version__
from adaptconv.measure import machine_limits
from adaptconv.problem import Device
from adaptconv.records import toolchain


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
        "measured_on": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def write_results(path: Path, device: torch.device, **content: object) -> None:
    """Write a results file: the machine's facts, and what was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine_facts(device), **content}, indent=1) + "\n", encoding="utf-8")
