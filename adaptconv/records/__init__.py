"""What was measured, and the layered database that remembers it.

``record`` says what a record is, ``toolchain`` when it is still valid, ``keys`` how far apart two
problems are, ``files`` how one file is read and written, ``calibrations`` what is kept of a device as a whole,
``layers`` and ``store`` how the layers answer, ``packs`` how records travel between machines.
"""

from __future__ import annotations

from adaptconv.records.calibrations import Calibration
from adaptconv.records.keys import Features, distance, parse_key, problem_of
from adaptconv.records.layers import DatabaseWarning
from adaptconv.records.packs import (
    Conflict,
    Difference,
    Merged,
    combine,
    diff,
    export_shipped,
    merge,
    verify,
    write_packs,
)
from adaptconv.records.record import SCHEMA, ForeignSchema, Record, Rival, utc_now
from adaptconv.records.store import Calibrated, DatabaseError, Hit, Store, advance, default_store, epoch, use_database
from adaptconv.records.toolchain import is_current, toolchain

__all__ = [
    "SCHEMA",
    "Calibrated",
    "Calibration",
    "Conflict",
    "DatabaseError",
    "DatabaseWarning",
    "Difference",
    "Features",
    "ForeignSchema",
    "Hit",
    "Merged",
    "Record",
    "Rival",
    "Store",
    "advance",
    "combine",
    "default_store",
    "diff",
    "distance",
    "epoch",
    "export_shipped",
    "is_current",
    "merge",
    "parse_key",
    "problem_of",
    "toolchain",
    "use_database",
    "utc_now",
    "verify",
    "write_packs",
]
