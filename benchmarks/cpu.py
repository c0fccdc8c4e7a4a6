"""Every figure of the README's performance section, in one command: ``python -m benchmarks.cpu --out DIR``.

Runs, one after the other and each in a process of its own: the layers in float32 against all that torch has, the
depthwise layers in bfloat16, a dozen layers in either half precision, the whole networks in float32 and under bfloat16
autocast, and what predictions and tuning cost against the best there is. What is not in the database is tuned first.
About four hours on two cores; each step writes as it goes, and the command goes on where it was cut off. Run it on an
idle machine.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from adaptconv.problem import Device

_STEPS = {
    "layers": "benchmarks.run --suite cpu --tune --keep-memory --resume --out {out}/layers-{slug}.json"
    " --chart {pictures}/layers.png",
    "bfloat16": "benchmarks.run --suite depthwise-bf16 --tune --keep-memory --resume --seconds 0.7"
    " --out {out}/bf16-{slug}.json",
    "halves-fp16": "benchmarks.run --suite halves-fp16 --rivals compile --tune --keep-memory --resume --seconds 0.6"
    " --out {out}/halves-fp16-{slug}.json",
    "halves-bf16": "benchmarks.run --suite halves-bf16 --rivals compile --tune --keep-memory --resume --seconds 0.6"
    " --out {out}/halves-bf16-{slug}.json",
    "networks": "benchmarks.nets --tune --train --keep-memory --resume --out {out}/nets-{slug}.json"
    " --chart {pictures}/nets.png",
    "networks-bf16": "benchmarks.nets --dtype bfloat16 --autocast --tune --train --budget 50 --seconds 5 --keep-memory"
    " --resume --out {out}/nets-bf16-{slug}.json",
    "predictions": "benchmarks.regret --suite cpu --keep-memory --out {out}/regret-{slug}.json",
    "exhaustive": "benchmarks.regret --suite cpu --exhaustive --keep-memory --out {out}/exhaustive-{slug}.json",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 1 if any of them found a wrong result or failed."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for the JSON files")
    parser.add_argument("--pictures", type=Path, default=Path("benchmarks/pictures"), help="folder for the charts")
    parser.add_argument("--steps", nargs="+", choices=list(_STEPS), default=list(_STEPS), help="these alone")
    parser.add_argument("--print", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args(argv)
    slug = Device.of(torch.device("cpu")).slug
    failed = []
    for name in arguments.steps:
        line = _STEPS[name].format(out=arguments.out, pictures=arguments.pictures, slug=slug)
        print(f"$ python -m {line}", flush=True)
        if not arguments.print and subprocess.run([sys.executable, "-m", *shlex.split(line)], check=False).returncode:
            failed.append(name)
    if failed:
        print(f"not as it should be: {', '.join(failed)}; see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
