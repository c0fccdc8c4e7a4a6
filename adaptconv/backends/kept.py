"""Tables of known values, made once for a device and kept between calls.

On a GPU three things come on top. A captured graph goes on reading the tables it was captured with, so those are never
given up. A table made by kernels may be read on another stream, so it is finished before anyone has it. And whoever
captures may direct this thread's allocations into memory of their own, where a table must not lie: it is made in a
thread of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")

_captured: dict[int, Tensor] = {}  # by address in Python: what some captured graph reads


def kept(maxsize: int) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Keep the tensors a function makes, by its arguments; the last one is the device. They are never written to.

    Args:
        maxsize: how many, of those that no captured graph reads.
    """

    def decorate(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
        @lru_cache(maxsize=maxsize)
        def once(*arguments: Any) -> Tensor:
            return _beside(make, arguments) if arguments[-1].type == "cuda" else make(*arguments)  # type: ignore[call-arg]

        @wraps(make)
        def known(*arguments: P.args, **named: P.kwargs) -> Tensor:
            assert not named, "by place alone, so that one table has one key"
            table = once(*arguments)
            if table.is_cuda and torch.cuda.is_current_stream_capturing():
                _captured[id(table)] = table
            return table

        return known

    return decorate


def _beside(make: Callable[..., Tensor], arguments: tuple[Any, ...]) -> Tensor:
    """Run in a thread of its own, until the device has finished too.

    Raises:
        BaseException: whatever ``make`` raises.
    """
    made: list[Tensor] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            with torch.no_grad(), torch.cuda.device(arguments[-1]):
                made.append(make(*arguments))
                torch.cuda.current_stream().synchronize()
        except BaseException as failure:  # noqa: BLE001 - it is raised where the table was asked for
            failed.append(failure)

    thread = threading.Thread(target=run, name="adaptconv-tables")
    thread.start()
    thread.join()
    if failed:
        raise failed[0]
    return made[0]
