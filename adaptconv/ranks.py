"""Ranks of a distributed job: who this process is, and what the first rank to speak on a topic said.

Nothing here waits for another rank: one that compiles less, later or not at all keeps nobody.
"""

from __future__ import annotations

import hashlib
import sys
import warnings

import torch

_warned = False


class RanksDisagree(UserWarning):
    """Ranks of one job would plan the same convolution differently, or could not be asked."""


def rank_and_world() -> tuple[int, int]:
    """The rank of this process and how many there are; ``(0, 1)`` where no process group is initialised."""
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def may_be_sharded_by_fsdp() -> bool:
    """Whether parameters may be FSDP's, which writes them anew at their old place and leaves no trace in their version.

    Whatever is kept of a parameter by identity and version would then outlive its values.
    """
    distributed = torch.distributed
    return "torch.distributed.fsdp" in sys.modules and distributed.is_available() and distributed.is_initialized()


def first_said(topic: str, value: str) -> str:
    """What the first rank to speak on a topic said: ``value`` where nobody did before, or where there is one rank.

    One exchange with the default process group's store, the first to write wins. A store that fails costs one
    warning, and this rank then goes by what it thinks itself.

    Args:
        topic: any text; only its hash travels.
        value: what this rank says, not empty.
    """
    if rank_and_world()[1] < 2:
        return value
    try:
        store = torch.distributed.distributed_c10d._get_default_store()
        key = hashlib.sha256(topic.encode()).hexdigest()[:32]
        said: bytes = store.compare_set(f"adaptconv/{key}", "", value)
        return said.decode()
    except Exception as error:  # noqa: BLE001 - whatever a store raises, a model must run
        global _warned
        if not _warned:
            _warned = True
            warnings.warn(
                f"adaptconv: the process group's store could not be asked whether ranks agree on plans "
                f"({type(error).__name__}: {error}); every rank goes by its own database",
                RanksDisagree,
                stacklevel=2,
            )
        return value
