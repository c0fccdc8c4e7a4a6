"""What is recognised, and what is not to be: ``python -m benchmarks.patterns``.

First a table of ways to write a convolution (torch's modules and functions, sums, unfolded products, kernels that a
model builds as it runs), each tried in six ways:

    recognised      a dry run finds the site: its taps, its padding, whether its kernel is constructed
    forward         inference, the site forced onto a backend of ours
    gradients       training, with the gradients of the input and of every parameter
    dynamic shapes  two sizes through one graph
    autocast        training under autocast to bfloat16
    channels_last   training on such an input (2-D and 3-D)

Right means: torch's shape, dtype and strides, and no further from float64 than four times torch itself.
Then look-alikes: models in which something is close to a site and is none. Each must be left alone and stay right.
Graphs are run as rewritten, without Inductor: this is about what is rewritten into what. The exit status is 1 if
anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tabulate import tabulate

from benchmarks.facts import machine_facts, write_results
from tests.lookalikes import LOOKALIKES
from tests.lookalikes.verdict import verdict
from tests.patterns import PATTERNS
from tests.patterns.base import Pattern
from tests.patterns.columns import COLUMNS


@dataclass(frozen=True, slots=True)
class Row:
    """One pattern.

    Attributes:
        pattern: its name.
        kind: of site.
        taps: that it has, "" where it is no convolution of ours.
        wrong: column by column what is wrong, "" for nothing, None where it does not apply.
    """

    pattern: str
    kind: str
    taps: str
    wrong: dict[str, str | None]


def row_of(pattern: Pattern) -> Row:
    """Every cell of a pattern; whatever is raised is what is wrong."""
    wrong: dict[str, str | None] = {}
    for column, check in COLUMNS.items():
        if column == "channels_last" and pattern.axes == 1:
            wrong[column] = None
            continue
        try:
            wrong[column] = check(pattern)
        except Exception as error:  # noqa: BLE001 - a crash is a false cell, not the end of the table
            wrong[column] = f"{type(error).__name__}: {error}"
    return Row(pattern.name, pattern.kind, str(pattern.taps or ""), wrong)


def _say(text: str) -> None:
    print(text[:200], file=sys.stderr, flush=True)


def _cell(wrong: str | None) -> str:
    return "-" if wrong is None else "NO" if wrong else "yes"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table and the count of look-alikes; 1 if a cell is false or a look-alike was touched."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.patterns", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[""], metavar="WORDS", help="patterns and look-alikes named so")
    parser.add_argument("--out", type=Path, help="also write JSON here, with what is wrong in words")
    arguments = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")

    def asked(name: str) -> bool:
        return any(words in name for words in arguments.only)

    rows: list[Row] = []
    for pattern in (pattern for pattern in PATTERNS if asked(pattern.name)):
        rows.append(row_of(pattern))
        _say(f"{pattern.name}: {', '.join(f'{c} {text}' for c, text in rows[-1].wrong.items() if text)}")
    alike: dict[str, str] = {}
    for lookalike in (lookalike for lookalike in LOOKALIKES if asked(lookalike.name)):
        alike[lookalike.name] = verdict(lookalike)
        _say(f"look-alike {lookalike.name}: {alike[lookalike.name]}")
    table = [[row.pattern, row.kind, row.taps[:30], *(_cell(row.wrong[column]) for column in COLUMNS)] for row in rows]
    print(tabulate(table, headers=("pattern", "site", "taps", *COLUMNS)))
    strict = [look.name for look in LOOKALIKES if look.name in alike and look.seems]
    left, right = sum(not alike[name] for name in strict), sum(not alike[name] for name in alike)
    print(f"\ntorch {torch.__version__}: {_count(rows)}")
    print(
        f"look-alikes: {left}/{len(strict)} untouched and correct; {right}/{len(alike)} correct with those that may be"
    )
    print("rewritten as long as they stay right")
    faults = {f"{row.pattern}, {column}": text for row in rows for column, text in row.wrong.items() if text}
    faults |= {f"look-alike: {name}": text for name, text in alike.items() if text}
    for where, text in faults.items():
        print(f"  {where}: {text[:300]}")
    if arguments.out:
        facts = machine_facts(torch.device("cpu"))
        write_results(
            arguments.out, torch.device("cpu"), facts=facts, rows=[asdict(row) for row in rows], lookalikes=alike
        )  # fmt: skip
    return int(bool(faults))


def _count(rows: Sequence[Row]) -> str:
    cells = [text for row in rows for text in row.wrong.values() if text is not None]
    return f"{sum(not text for text in cells)}/{len(cells)} cells of {len(rows)} patterns true"


if __name__ == "__main__":
    raise SystemExit(main())
