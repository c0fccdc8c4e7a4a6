"""``python -m adaptconv``."""

import sys

from adaptconv.cli import main

sys.exit(main())
