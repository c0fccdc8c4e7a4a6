"""Real inputs shipped by a package, so that a benchmark needs neither a download nor made-up data."""

from __future__ import annotations

import importlib
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

PHOTOGRAPH_SIZE = 512
RECORDING_LENGTH = 1024


def photograph(size: int = PHOTOGRAPH_SIZE) -> Tensor:
    """A photograph: PyWavelets' cameraman picture (CC0, by Lav Varshney), grey, repeated to three channels.

    Args:
        size: height and width in pixels, 1 to 512; smaller than 512 is a smoothed resize of the whole picture.

    Returns:
        ``[1, 3, size, size]`` float32, contiguous, in [0, 1].

    Raises:
        ModuleNotFoundError: PyWavelets is not installed.
        ValueError: a size outside 1 to 512.
    """
    if not 1 <= size <= PHOTOGRAPH_SIZE:
        raise ValueError(f"the photograph is {PHOTOGRAPH_SIZE} pixels wide: size must be 1 to that, got {size}")
    grey = torch.tensor(_shipped().camera(), dtype=torch.float32)[None, None] / 255
    if size != PHOTOGRAPH_SIZE:
        grey = F.interpolate(grey, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return grey.clamp(0, 1).repeat(1, 3, 1, 1)


def electrocardiogram(batch: int = 1, length: int = RECORDING_LENGTH) -> Tensor:
    """Windows of a recorded electrocardiogram (1024 samples, shipped by PyWavelets), each normalised.

    Window starts are spread evenly over the recording, first to last, so windows overlap when
    ``batch * length`` exceeds it.

    Args:
        batch: number of windows N, each at a different start.
        length: samples a window L, 2 to 1024.

    Returns:
        ``[N, 1, L]`` float32, contiguous; every window has mean 0 and standard deviation 1.

    Raises:
        ModuleNotFoundError: PyWavelets is not installed.
        ValueError: windows longer than the recording, or more of them than there are starts.
    """
    if not 2 <= length <= RECORDING_LENGTH:
        raise ValueError(f"the recording has {RECORDING_LENGTH} samples: length must be 2 to that, got {length}")
    last = RECORDING_LENGTH - length
    if not 1 <= batch <= last + 1:
        raise ValueError(
            f"the recording has {last + 1} different windows of {length} samples: batch must be 1 to that, got {batch}"
        )
    recording = torch.tensor(_shipped().ecg(), dtype=torch.float32)
    starts = [last * i // max(1, batch - 1) for i in range(batch)]
    windows = torch.stack([recording[start : start + length] for start in starts])
    centred = windows - windows.mean(dim=1, keepdim=True)
    return (centred / centred.std(dim=1, keepdim=True, correction=0))[:, None]


def _shipped() -> ModuleType:
    """PyWavelets' module of data sets: arrays inside its wheel, read from disk."""
    try:
        return importlib.import_module("pywt.data")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the benchmark data (a photograph, an electrocardiogram) is shipped by PyWavelets, which is not "
            "installed: pip install -e .[demo]",
            name="pywt",
        ) from error
