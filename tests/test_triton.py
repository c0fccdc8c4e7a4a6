"""The Triton kernels where there is no GPU: interpreted, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
WORKERS = "2"


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the same tests run on the GPU")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already")
def test_the_kernels_agree_with_the_oracle_in_the_interpreter() -> None:
    """Triton decides when a kernel is defined whether to interpret it: hence a process that does from the start."""
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", WORKERS, "-m", "triton",
        "tests/triton", "tests/test_conformance.py",
    ]  # fmt: skip
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    last = (done.stdout.strip().splitlines() or [""])[-1]
    print(last)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]
    passed = re.search(r"(\d+) passed", last)
    assert passed is not None
    assert int(passed[1]) > 300, last
