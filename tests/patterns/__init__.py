"""Ways to write a convolution, in torch's words and in people's, each with what must be recognised in it."""

# isort: off
from tests.patterns import geometry, composed, holes, built  # the order of the table

# isort: on
from tests.patterns.base import PATTERNS, Pattern

__all__ = ["PATTERNS", "Pattern", "built", "composed", "geometry", "holes"]
