"""torch.compile: graph -> sites -> rewritten graph, and the registered backend."""

from adaptconv.compile.inductor import backend

__all__ = ["backend"]
