"""adaptconv: convolutions with holes in PyTorch, each computed the fastest exact way known on this device.

Importing touches no file and no device, and imports neither optuna nor triton.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from adaptconv import kernels as kernels
from adaptconv._version import __version__ as __version__
from adaptconv.backends import backend_names as backends
from adaptconv.errors import BackendRejected
from adaptconv.functional import conv1d, conv2d, conv3d
from adaptconv.kernel import Kernel
from adaptconv.kernels.grid import dilate
from adaptconv.modules import AdaptiveConv1d, AdaptiveConv2d, AdaptiveConv3d
from adaptconv.pins import pinned
from adaptconv.taps import TapPattern

if TYPE_CHECKING:
    from adaptconv.compile.optimize import optimize
    from adaptconv.reports import explain, report
    from adaptconv.swap import adapt, restore
    from adaptconv.tuner import tune


__all__ = [
    "AdaptiveConv1d", "AdaptiveConv2d", "AdaptiveConv3d", "BackendRejected", "Kernel", "TapPattern", "adapt",
    "backends", "conv1d", "conv2d", "conv3d", "dilate", "explain", "kernels", "optimize", "pinned", "report", "restore",
    "tune",
]  # fmt: skip

_LATER = {
    "adapt": "swap", "restore": "swap", "optimize": "compile.optimize", "explain": "reports", "report": "reports",
    "tune": "tuner",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what compiling, tuning and reporting need only when they are asked for."""
    if name not in _LATER:
        raise AttributeError(f"module 'adaptconv' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"adaptconv.{_LATER[name]}"), name)
