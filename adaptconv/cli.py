"""The command line: ``adaptconv demo | tune | report | explain | bench | db | doctor``."""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adaptconv._version import __version__
from adaptconv.errors import AdaptConvError

_EPILOG = """\
examples:
  adaptconv demo                                  the main job on a real photograph and a real recording
  adaptconv tune mypackage.models:factory         measure a model's convolutions once on this machine
  adaptconv report mypackage.models:factory       what optimize() would do with it, and why
  adaptconv explain --input 4,64,56,56 --weight 64,1,7,7 --dilation 3 --padding 9 --groups 64
  adaptconv doctor                                what this machine has, and what that means
  adaptconv doctor --calibrate                    once a machine: predict with its own speeds

a factory is a function of no arguments that returns (model, example_inputs)
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors the user can mend are one line on stderr and exit status 2."""
    arguments = _parser().parse_args(argv)
    try:
        status: int = arguments.run(arguments)
        return status
    except AdaptConvError as error:
        print(f"adaptconv {arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"adaptconv {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "adaptconv", description="Convolutions with holes, each computed the fastest exact way known on this device.",
        epilog=_EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"adaptconv {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, run: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    demo = command("demo", "tune, compile, check and report two real networks, in under three minutes", _demo)
    demo.add_argument("rest", nargs=argparse.REMAINDER, help="passed on; see 'adaptconv demo -- --help'")

    tune = command("tune", "measure a model's convolutions and remember the fastest exact way", _tune)
    _model_options(tune, "tune both gradients as well")
    tune.add_argument("--budget", type=_seconds, metavar="60s", help="time for the whole run: 90, 60s, 5m, 1h")
    tune.add_argument("--trials", type=_positive, metavar="N", help="most configurations tried a backend")
    workers = "processes that compile GPU kernels ahead of their turn: 0 for none (one less than there are processors)"
    tune.add_argument("--workers", type=int, metavar="N", help=workers)
    tune.add_argument("--storage", metavar="URL", help="an Optuna RDB, e.g. sqlite:///study.db, to share or resume")
    tune.add_argument("--force", action="store_true", help="measure again what the database already knows")
    tune.add_argument("--database", type=Path, metavar="DIR", help="write here instead of the user's cache")

    report = command("report", "what optimize() would do with a model, and why; compiles nothing", _report)
    _model_options(report, "include both gradients")
    report.add_argument("--format", choices=("table", "markdown", "json"), default="table")

    explain = command("explain", "every candidate for a convolution, what it answered and why", _explain)
    _model_options(explain, "both gradients too", nargs="?")
    explain.add_argument("--input", type=_ints, metavar="N,C,H,W", help="input shape, for one layer")
    explain.add_argument("--weight", type=_ints, metavar="O,I,K,K", help="weight shape; O,I,T with --taps")
    explain.add_argument("--taps", metavar="PATTERN", help="tap pattern, e.g. 10101/00100 or 3x3d2x2")
    explain.add_argument("--stride", type=_ints, default=(1,))
    explain.add_argument("--padding", type=_ints_or_word, default=(0,), help="ints, 'same' or 'valid'")
    explain.add_argument("--dilation", type=_ints, default=(1,))
    explain.add_argument("--groups", type=int, default=1)
    explain.add_argument("--dtype", default="float32", choices=("float64", "float32", "bfloat16", "float16"))
    explain.add_argument("--channels-last", action="store_true")

    bench = command("bench", "run the benchmark suites of a clone", _bench)
    bench.add_argument("rest", nargs=argparse.REMAINDER, help="passed on; see 'adaptconv bench -- --help'")

    db = command("db", "look after the tuning database", _db)
    db.add_argument("action", choices=("list", "verify", "export", "merge", "diff"))
    uses = "verify PATH; export DIR; merge OUT IN...; diff A B"
    db.add_argument("paths", nargs="*", type=Path, metavar="PATH", help=uses)

    doctor = command("doctor", "what this machine has (torch, compiler, GPU, database) and what that means", _doctor)
    calibrate = "measure what predictions rest on, in under 10 s on an idle machine, and keep it where tuning writes"
    doctor.add_argument("--calibrate", action="store_true", help=calibrate)
    doctor.add_argument("--budget", type=_seconds, default=6.0, metavar="6s", help="time for --calibrate to measure")
    return parser


def _model_options(command: argparse.ArgumentParser, train: str, **factory: Any) -> None:
    """What every command takes that looks at a model."""
    command.add_argument(
        "factory", metavar="package.module:factory", help="returns (model, example_inputs)", **factory
    )  # fmt: skip
    command.add_argument("--train", action="store_true", help=train)
    command.add_argument(
        "--autocast", choices=("bfloat16", "float16"),
        help="for a model that runs under torch.autocast of this dtype: its convolutions are in it",
    )  # fmt: skip


# ---- reading arguments ----------------------------------------------------------------------------


def _seconds(text: str) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|h)?", text)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"a duration such as 90, 60s, 5m or 1h was expected, got {text!r}")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 1}[match[2]]


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a whole number of at least 1 was expected, got {text!r}")
    return int(text)


def _ints(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"whole numbers joined by commas were expected, got {text!r}") from None


def _ints_or_word(text: str) -> tuple[int, ...] | str:
    return text if text in ("same", "valid") else _ints(text)


# ---- commands -------------------------------------------------------------------------------------


def _tune(a: argparse.Namespace) -> int:
    from adaptconv.tuner import autocast_for, load_factory, tune

    model, inputs = load_factory(a.factory)
    with autocast_for(a.autocast, model, inputs):
        result = tune(
            model, inputs, train=a.train, budget_s=a.budget, trials=a.trials, storage=a.storage, force=a.force,
            database=a.database, workers=a.workers,
        )  # fmt: skip
    print(result)
    return 130 if result.interrupted else 0


def _report(a: argparse.Namespace) -> int:
    from adaptconv.reports import report
    from adaptconv.tuner import autocast_for, load_factory

    model, inputs = load_factory(a.factory)
    with autocast_for(a.autocast, model, inputs):
        made = report(model, inputs, train=a.train)
    shown = {"table": made.__str__, "markdown": made.to_markdown, "json": made.to_json}[a.format]
    print(shown())
    return 0


def _explain(a: argparse.Namespace) -> int:
    from adaptconv.reports import explain

    if a.factory:
        from adaptconv.compile.optimize import as_arguments
        from adaptconv.tuner import autocast_for, load_factory

        model, inputs = load_factory(a.factory)
        args, _ = as_arguments(inputs)
        with autocast_for(a.autocast, model, inputs):
            print(explain(model, *args, train=a.train))
        return 0
    if a.input is None or a.weight is None:
        raise AdaptConvError("give a factory, or --input and --weight of one layer; see adaptconv explain --help")
    if a.autocast:
        raise AdaptConvError("--autocast is for the models of factories; of one layer say --dtype")
    print(explain(*_layer_of(a), train=a.train))
    return 0


def _layer_of(a: argparse.Namespace) -> tuple[Any, Any]:
    """The AdaptiveConv that the options describe, and zeros to call it on."""
    import torch

    from adaptconv import modules

    axes = len(a.input) - 2
    if axes not in (1, 2, 3):
        raise AdaptConvError(f"--input is N,C and 1 to 3 extents, got {','.join(map(str, a.input))}")
    cls = (modules.AdaptiveConv1d, modules.AdaptiveConv2d, modules.AdaptiveConv3d)[axes - 1]
    padding = a.padding if isinstance(a.padding, str) or len(a.padding) == axes else a.padding * axes
    common: dict[str, Any] = {
        "stride": a.stride * axes if len(a.stride) == 1 else a.stride, "padding": padding, "groups": a.groups,
        "bias": False, "dtype": getattr(torch, a.dtype),
    }  # fmt: skip
    dilation = a.dilation * axes if len(a.dilation) == 1 else a.dilation
    where = {"taps": a.taps} if a.taps else {"kernel_size": tuple(a.weight[2:]), "dilation": dilation}
    try:
        layer = cls(a.input[1], a.weight[0], **where, **common)
    except (RuntimeError, TypeError, ValueError) as error:  # torch's own words for a layer that cannot be
        raise AdaptConvError(f"no such layer: {error}") from error
    x = torch.zeros(a.input, dtype=common["dtype"], requires_grad=a.train)
    if a.channels_last:
        x = x.contiguous(memory_format=torch.channels_last if axes == 2 else torch.channels_last_3d)
    return layer, x


def _from_clone(module: str, rest: Sequence[str]) -> int:
    """Run a module of the repository's benchmarks/, which is not part of the installed package."""
    root = Path(__file__).resolve().parent.parent
    if (root / "benchmarks").is_dir() and str(root) not in sys.path:
        sys.path.insert(0, str(root))
    if importlib.util.find_spec("benchmarks") is None:
        raise AdaptConvError("this command needs a clone of the repository: its networks live in benchmarks/")
    run: Callable[[Sequence[str]], int] = importlib.import_module(f"benchmarks.{module}").main
    return run([argument for argument in rest if argument != "--"])


def _demo(a: argparse.Namespace) -> int:
    return _from_clone("demo", a.rest)


def _bench(a: argparse.Namespace) -> int:
    return _from_clone("run", a.rest)


def _db(a: argparse.Namespace) -> int:
    from adaptconv import databases

    return databases.run(a.action, a.paths)


def _doctor(a: argparse.Namespace) -> int:
    from adaptconv import doctor

    if not a.calibrate:
        print(doctor.examine())
        return 0
    text, kept = doctor.calibrate(a.budget, lambda line: print(line, file=sys.stderr, flush=True))
    print(text)
    return 0 if kept else 1
