"""One task in a process of its own: ``python -m benchmarks.compiled.child MODEL TASK NUMBER ANSWER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.compiled import check, overhead


def main(name: str, task: str, number: str, answer: str) -> int:
    """Run a task and write its answer as JSON.

    Args:
        name: of the model.
        task: "compile", "optimize", "forced" or "overhead".
        number: input sizes, or with "overhead" seconds of timing.
        answer: file to write.
    """
    found = overhead.run(name, float(number)) if task == "overhead" else check.run(name, task, int(number))
    Path(answer).write_text(json.dumps(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
