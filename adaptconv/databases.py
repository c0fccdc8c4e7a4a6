"""``adaptconv db``: list, verify, export, merge and compare tuning databases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from adaptconv import records
from adaptconv.errors import AdaptConvError

_NEEDS = {"list": (0, 0), "verify": (1, 1), "export": (1, 1), "merge": (2, None), "diff": (2, 2)}
_USAGE = {
    "list": "adaptconv db list",
    "verify": "adaptconv db verify PATH",
    "export": "adaptconv db export DIRECTORY",
    "merge": "adaptconv db merge DIRECTORY SOURCE...",
    "diff": "adaptconv db diff A B",
}


def run(action: str, paths: Sequence[Path]) -> int:
    """Do one action; the exit status is 1 where ``verify`` finds faults or ``diff`` differences.

    Raises:
        AdaptConvError: the wrong number of paths, or a path that is missing or damaged.
    """
    least, most = _NEEDS[action]
    if len(paths) < least or (most is not None and len(paths) > most):
        raise AdaptConvError(f"usage: {_USAGE[action]}; got {len(paths)} paths")
    try:
        return {"list": _list, "verify": _verify, "export": _export, "merge": _merge, "diff": _diff}[action](paths)
    except (OSError, ValueError) as error:
        if isinstance(error, AdaptConvError):
            raise
        raise AdaptConvError(str(error)) from error


def _list(paths: Sequence[Path]) -> int:
    count = 0
    for hit in records.default_store().records():
        record = hit.record
        config = ",".join(f"{name}={value}" for name, value in record.config.items())
        gain = record.native_us / record.p20_us if record.p20_us else 1.0
        stale = "" if hit.current else "  (another toolchain)"
        print(
            f"{hit.layer:9} {record.backend} {config}  {record.p20_us:,.0f} us, {gain:.2f}x native  {record.key}{stale}"
        )
        count += 1
    print(f"{count} records")
    return 0


def _verify(paths: Sequence[Path]) -> int:
    faults = records.verify(paths[0])
    print("\n".join(faults) if faults else f"{paths[0]}: intact, {len(records.merge(paths[0]).records)} records")
    return 1 if faults else 0


def _export(paths: Sequence[Path]) -> int:
    written, conflicts = records.export_shipped(records.default_store(), paths[0])
    print("\n".join([*map(str, conflicts), *(f"wrote {path}" for path in written)]) or "no records to export")
    return 0


def _merge(paths: Sequence[Path]) -> int:
    target, *sources = paths
    merged = records.merge(*sources)
    written = records.write_packs(merged.records, target)
    print("\n".join([*map(str, merged.conflicts), *(f"wrote {path}" for path in written)]))
    return 0


def _diff(paths: Sequence[Path]) -> int:
    difference = records.diff(*paths)
    print(difference if difference else "no difference")
    return 1 if difference else 0
