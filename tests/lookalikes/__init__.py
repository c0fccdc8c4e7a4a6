"""Models that look like something a compiler pass may rewrite, and are not: each with what must be left alone.

The convolution inside may still be rewritten as the convolution it is: what must not happen is that it is taken for
more (a kernel with holes, a padded convolution, a term of a sum, an unfolded one). Each is a trap of its own. Some may
be taken for what they look like, and are here because they are easily made wrong by it.
"""

from tests.lookalikes import holes, hooks, leaves, linear, padding, sums, unfolding, values
from tests.lookalikes.base import LOOKALIKES, Lookalike

__all__ = [
    "LOOKALIKES", "Lookalike", "holes", "hooks", "leaves", "linear", "padding", "sums", "unfolding", "values",
]  # fmt: skip
