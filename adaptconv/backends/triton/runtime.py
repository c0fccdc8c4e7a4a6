"""Whether Triton can run here, and what is remembered of kernels that failed."""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from adaptconv import records
from adaptconv.errors import KernelWarning, told
from adaptconv.problem import Device, Problem

_LOG = logging.getLogger("adaptconv.backends.triton")
_LEAST = (3, 2)  # earlier ones lack what the kernels are written in
_NUMPY_OF_INTERPRETER = (2, 4)  # Triton's interpreter breaks from this numpy on: range() over a run-time int
_LEAST_CAPABILITY = (8, 0)  # bfloat16, asynchronous copies
_failed: dict[tuple[str, Problem], str] = {}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU: slow, and exact, for checking them without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")


def rejection(device: Device) -> str | None:
    """Why no Triton kernel can run on a device, in words; None if one may."""
    return _interpreter_missing() if interpreting() else _gpu_missing(device)


def _interpreter_missing() -> str | None:
    return _uninstalled() or _old_numpy()


def _gpu_missing(device: Device) -> str | None:
    if device.kind != "cuda":
        return "its kernels are for GPUs (TRITON_INTERPRET=1 in the environment runs them on a CPU, to check them)"
    return _uninstalled() or _old_gpu(device)


@cache
def _uninstalled() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'adaptconv[triton]')"
    try:
        found = version("triton")
    except PackageNotFoundError:  # some builds of torch bring it under another name
        return None
    if _numbers(found) < _LEAST:
        return f"Triton {found} is too old: its kernels need {'.'.join(map(str, _LEAST))}"
    return None


@cache
def _old_numpy() -> str | None:
    found = version("numpy")
    if _numbers(found) >= _NUMPY_OF_INTERPRETER:
        return f"Triton's interpreter does not work with numpy {found}: install numpy<2.4"
    return None


@cache
def _old_gpu(device: Device) -> str | None:
    if torch.version.hip is not None:
        return None
    if not torch.cuda.is_available():
        return "there is no GPU here"
    here = range(torch.cuda.device_count())
    index = next((i for i in here if Device.of(torch.device("cuda", i)) == device), torch.cuda.current_device())
    capability = torch.cuda.get_device_capability(index)
    if capability < _LEAST_CAPABILITY:
        return f"its kernels need compute capability 8.0, this GPU has {capability[0]}.{capability[1]}"
    return None


def _numbers(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


def failure_of(choice: str, problem: Problem) -> str | None:
    """Why a choice is known not to run a problem here, in words; None if it may."""
    return _failed.get((choice, problem))


def remember_failure(choice: str, problem: Problem, failure: Exception) -> None:
    """A kernel did not compile or launch: say so once, and have the problem planned anew without this choice."""
    text = told(failure)
    _failed[choice, problem] = f"its kernel failed in this process: {text}"
    records.advance()  # plans made before are forgotten
    _LOG.debug("the kernel of %s failed", choice, exc_info=failure)
    warnings.warn(
        f"the Triton kernel of {choice} failed on {problem}: {text}; this call is "
        f"answered by dense-construct, later ones by the next best plan",
        KernelWarning,
        stacklevel=2,
    )
