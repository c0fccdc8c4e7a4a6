"""What ``import adaptconv`` adds to ``import torch``: ``python -m benchmarks.imports``."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from functools import partial

_PROBE = """
import time, torch
start = time.perf_counter()
import adaptconv
elapsed = time.perf_counter() - start
import sys
heavy = [name for name in ("optuna", "triton", "tabulate", "sqlalchemy", "torch._dynamo") if name in sys.modules]
print(elapsed * 1e3, ",".join(heavy) or "none")
"""


def main(runs: int = 5) -> int:
    """Print the median over fresh processes, in milliseconds, and which heavy modules came along."""
    # Compiled modules are kept, as they are for any user who does not ask otherwise.
    given = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    probe = partial(
        subprocess.run, [sys.executable, "-c", _PROBE], env=given, capture_output=True, text=True, check=True
    )
    probe()  # the first run may compile
    found = [probe().stdout.split() for _ in range(runs)]
    times = [float(line[0]) for line in found]
    print(f"import adaptconv over import torch: median {statistics.median(times):.1f} ms of {runs} runs "
          f"({min(times):.1f} to {max(times):.1f}); heavy modules loaded: {found[0][1]}")  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
