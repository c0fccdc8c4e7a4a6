"""How precise float32 must be, by torch's flags: as a problem's key says it, and as a prepared call depends on it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

_precision = torch.get_float32_matmul_precision
_tf32 = torch._C._get_cudnn_allow_tf32
_onednn = partial(torch._C._get_fp32_precision_getter, "mkldnn", "conv")


def float32_flags() -> tuple[object, ...]:
    """How precise float32 must be, as the flags stand; by operation where they differ from the older, common ones."""
    try:
        return _precision(), _tf32(), _onednn()
    except RuntimeError:
        flags: Any = torch.backends
        return (
            flags.cuda.matmul.fp32_precision, flags.mkldnn.matmul.fp32_precision, flags.cudnn.conv.fp32_precision,
            _onednn(),
        )  # fmt: skip


def fp32_precision(dtype: torch.dtype, device: torch.device) -> str:
    """Say "ieee", or which reduced-precision float32 paths the torch flags allow on this device.

    Of float16 on a CPU it says so too, where float32 may be less precise than it.
    """
    on_cpu = device.type == "cpu"
    conv = "ieee"
    if on_cpu:  # half precision may be computed in float32
        conv = str(torch.backends.mkldnn.conv.fp32_precision)  # type: ignore[attr-defined]
        conv = "ieee" if conv == "none" or (conv == "tf32" and dtype is not torch.float32) else conv
    if dtype is not torch.float32:
        return f"conv-{conv}" if dtype is torch.float16 and conv != "ieee" else "ieee"
    allowed = []
    try:
        matmul = torch.get_float32_matmul_precision()
    except RuntimeError:  # the flags of one backend say something else than that of all
        of_device = torch.backends.mkldnn if on_cpu else torch.backends.cuda
        matmul = str(of_device.matmul.fp32_precision)
        matmul = {"ieee": "highest", "none": "highest", "tf32": "high"}.get(matmul, matmul)
    if matmul != "highest":
        allowed.append(f"matmul-{matmul}")
    if device.type == "cuda":
        try:
            conv = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"
        except RuntimeError:  # the per-backend fp32_precision flags are in use
            conv = str(torch.backends.cudnn.conv.fp32_precision)  # type: ignore[attr-defined]
    if conv != "ieee":
        allowed.append(f"conv-{conv}")
    return "+".join(allowed) or "ieee"
