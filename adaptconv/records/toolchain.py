"""Toolchain: the versions a measurement depends on, and when they have moved too far.

Only ``major.minor`` counts: patch releases and local suffixes (``+cpu``, ``+cu128``) leave kernels as
they are, minor releases change them. A record measured under another toolchain is stale: it no longer
answers a look-up, but still seeds tuning and hints from a distance.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

import torch

from adaptconv.records.record import Record

Validity = tuple[tuple[str, str], ...]

_TRITON_DISTRIBUTIONS = ("triton", "pytorch-triton", "triton-windows")


def toolchain(device: torch.device) -> dict[str, str]:
    """Versions that a measurement on this device depends on.

    Always ``torch``; on a CPU ``onednn``; on CUDA ``cuda``, ``cudnn``, ``driver`` and ``triton``, each
    where it is there. Nothing is imported and no GPU is touched to find out.
    """
    return dict(_toolchain(device.type))


def validity(versions: Mapping[str, str]) -> Validity:
    """The part of a toolchain that decides whether two measurements compare: ``major.minor`` of each."""
    return tuple(sorted((name, _minor(version)) for name, version in versions.items()))


def is_current(record: Record, device: torch.device) -> bool:
    """Whether a record was measured under a toolchain equivalent to the one on this device now."""
    return validity(record.toolchain) == validity_now(device.type)


@cache
def validity_now(kind: str) -> Validity:
    """The validity of the toolchain here, for a kind of device ("cpu", "cuda", ...)."""
    return validity(_toolchain(kind))


@cache
def _toolchain(kind: str) -> dict[str, str]:
    found: dict[str, str | None] = {"torch": str(torch.__version__)}
    if kind == "cpu":
        build = re.search(r"MKL-DNN v([\d.]+)", torch.__config__.show())
        found["onednn"] = build[1] if build else None
    elif kind == "cuda":
        found |= {"cuda": torch.version.cuda, "cudnn": _cudnn(), "driver": _driver(), "triton": _triton()}
    return {name: version for name, version in sorted(found.items()) if version}


def _minor(version: str) -> str:
    match = re.match(r"\d+(\.\d+)?", version, re.ASCII)
    return match[0] if match else version


def _cudnn() -> str | None:
    number: int | None = None
    if torch.version.cuda is not None:
        number = torch.backends.cudnn.version()
    if not number:
        return None
    # cuDNN 9 packs its version as 10000 * major + 100 * minor, cuDNN 8 as 1000 * major + 100 * minor.
    major, rest = divmod(number, 10_000 if number >= 90_000 else 1_000)
    return f"{major}.{rest // 100}"


def _driver() -> str | None:
    """The CUDA version the driver supports, e.g. ``12.8``; it moves with the driver's branch."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    number = int(ask()) if ask is not None else 0
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def _triton() -> str | None:
    from importlib import metadata  # slow to import, and only a GPU needs it

    for name in _TRITON_DISTRIBUTIONS:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None
