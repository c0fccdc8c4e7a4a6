"""Check, tune and time everything on a GPU in one call: ``python -m benchmarks.gpu --out DIR --minutes 9``.

In this order, each with its share of the minutes:

1. limits: copy bandwidth and matrix product, per dtype;
2. check: every backend against float64: the Triton kernels on the workload suite's layers at a small batch, then every
   backend x case x direction x dtype;
3. tune: the workload suite, forward first, into a pack that ``tuning_db/`` takes;
4. time: our plans against cuDNN in both layouts (``cudnn.benchmark`` on), dense-constructed kernels, sums of
   convolutions and, with ``--rivals compile``, torch.compile; device time from graph replays with cold caches;
5. train: a training step of ConvNeXt-T-dcls against the same network with plain convolutions.

Kernels are compiled ahead, in processes of their own. The work is done in one process beside this one: what kills it
(an address out of bounds ends every later call on a GPU) or has it hang is noted as wrong, and the rest goes on without
it. Files are written as the work goes on, so a call that is cut off loses its last row at most; ``--continue DIR``
takes up an earlier one. Needs torch, triton, numpy, tabulate and Optuna (with colorlog), nothing else. On a CPU
(``--device cpu``) it runs too, to try it out.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu import supervisor
from benchmarks.gpu.steps import STEPS
from benchmarks.layers.tensors import DIRECTIONS
from benchmarks.suites import SUITES


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps, print the tables last; 1 if a result is wrong, 3 if nothing came back."""
    arguments = _parser().parse_args(argv)
    names = [layer.name for layer in SUITES[arguments.suite]]
    if unknown := sorted(set(arguments.only or ()) - set(names)):
        sys.exit(f"suite {arguments.suite} has no layer {', '.join(unknown)}; it has {', '.join(names)}")
    if arguments.worker:
        from benchmarks.gpu.campaign import Campaign

        Campaign(arguments).run()
        return 0
    if arguments.device != "cpu" and not torch.cuda.is_available():
        _parser().error("there is no GPU here; --device cpu tries the command out, and its figures mean nothing")
    until = time.time() + 60 * arguments.minutes
    return supervisor.run(arguments, list(sys.argv[1:] if argv is None else argv), until)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for all files")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (9)")
    parser.add_argument("--continue", type=Path, dest="earlier", metavar="DIR", help="take up what is in this folder")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS), help="these alone")
    parser.add_argument("--suite", choices=sorted(SUITES), default="gpu")
    parser.add_argument("--only", nargs="+", metavar="LAYER", help="these layers of the suite")
    parser.add_argument("--directions", nargs="+", choices=list(DIRECTIONS), default=list(DIRECTIONS))
    parser.add_argument("--rivals", choices=("eager", "compile"), default="eager", help="compile is slow to start")
    parser.add_argument("--seconds", type=float, default=0.5, help="timing a row (0.5)")
    parser.add_argument("--workers", type=int, help="processes that compile ahead (one less than there are processors)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--worker", type=float, metavar="UNTIL", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    raise SystemExit(main())
