"""What interpreted kernels do to memory, watched: a GPU answers an address out of bounds with an end of the process.

The interpreter reads and writes where it is told to, and runs programs one after the other, so that neither a read
behind a tensor nor two programs at one element changes what comes out. Here every access of every launch is compared
with the tensors the launch was given, and with what its other programs wrote.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_MOST_OWNED = 1 << 26  # bytes of a tensor up to which it is known which program wrote each


class _Launch:
    """The tensors of one launch, and which program wrote each of their bytes."""

    def __init__(self, kernel: str, tensors: list[Tensor]) -> None:
        self.kernel = kernel
        storages = [t.untyped_storage() for t in tensors]  # a launch may be told by a view where to begin
        self.spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages if s.nbytes()})
        self.owners = {
            span: np.full(span[1] - span[0], -1, np.int32) for span in self.spans if span[1] - span[0] <= _MOST_OWNED
        }
        self.program = 0

    def access(self, kind: str, addresses: np.ndarray, width: int) -> str:
        """What is wrong with reading or writing ``width`` bytes at each address; empty if nothing is."""
        addresses = addresses.astype(np.int64).ravel()
        left = np.ones(addresses.shape, bool)
        fault = ""
        for span in self.spans:
            inside = (addresses >= span[0]) & (addresses + width <= span[1])
            left &= ~inside
            owners = self.owners.get(span)
            if owners is None or not inside.any():
                continue
            at = addresses[inside] - span[0]
            others = (owners[at] >= 0) & (owners[at] != self.program)
            if others.any():
                fault = f"{kind} of {int(others.sum())} elements that another program of the launch wrote"
            if kind == "write":
                if np.unique(at).size < at.size:
                    fault = f"write of {at.size - np.unique(at).size} elements twice at once"
                for byte in range(width):
                    owners[at + byte] = self.program
        if left.any():
            nearest = min((abs(int(addresses[left][0]) - edge), edge) for span in self.spans for edge in span)
            fault = f"{kind} of {int(left.sum())} elements out of bounds, {nearest[0]} bytes from the nearest tensor"
        if (addresses % width).any():
            fault = f"{kind} at an address that is no multiple of the element's {width} bytes"
        return fault


class Poisoned(TorchDispatchMode):
    """New tensors are NaN (integers: far out of bounds) until something is written to them."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "new_empty", "empty_like", "empty_strided") and 0 < result.numel() < _MOST_OWNED:
            result.fill_(float("nan") if result.is_floating_point() else 1 << 30)
        return result


@contextmanager
def watched(patch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Watch all interpreted launches; what was wrong with them is appended to the list."""
    from triton.runtime import interpreter

    faults: list[str] = []
    launches: list[_Launch] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    call, load, store, step = (
        executor.__call__, builder.create_masked_load, builder.create_masked_store, builder.set_grid_idx
    )  # fmt: skip

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        launches.append(_Launch(self.fn.__name__, tensors))
        try:
            return call(self, *args, **kwargs)
        finally:
            launches.pop()

    def entered(self: Any, x: int, y: int, z: int) -> None:
        _, height, depth = self.grid_dim
        launches[-1].program = (x * height + y) * depth + z
        step(self, x, y, z)

    def check(kind: str, pointers: Any, mask: Any) -> None:
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        if addresses.size:
            width = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
            fault = launches[-1].access(kind, addresses, width)
            if fault:
                faults.append(f"{launches[-1].kernel}: {fault}")

    def loaded(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        check("read", pointers, mask)
        return load(self, pointers, mask, *rest)

    def stored(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        check("write", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    patch.setattr(executor, "__call__", launched)
    patch.setattr(builder, "set_grid_idx", entered)
    patch.setattr(builder, "create_masked_load", loaded)
    patch.setattr(builder, "create_masked_store", stored)
    yield faults
