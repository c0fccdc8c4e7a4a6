"""Store: the layered database. Reading never raises; writing goes to one place and says why it cannot."""

from __future__ import annotations

import hashlib
import heapq
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from adaptconv.errors import AdaptConvError
from adaptconv.problem import Device, Problem
from adaptconv.records import calibrations, files
from adaptconv.records.calibrations import Calibration
from adaptconv.records.files import Refused
from adaptconv.records.keys import STALE, distance, parse_key
from adaptconv.records.layers import Layer, Row
from adaptconv.records.record import Record
from adaptconv.records.toolchain import validity, validity_now

ENVIRONMENT = "ADAPTCONV_DB"
_LEFTOVER_S = 3600.0


class DatabaseError(AdaptConvError, OSError):
    """A record could not be stored; the message says where, why and what to do."""


@dataclass(frozen=True, slots=True)
class Hit:
    """A record, and where it was found.

    Attributes:
        record: the record.
        layer: name of the layer: "override", "project", "user" or "shipped".
        path: the file.
        current: whether it was measured under a toolchain equivalent to the one here now.
    """

    record: Record
    layer: str
    path: Path
    current: bool


@dataclass(frozen=True, slots=True)
class Calibrated:
    """A calibration, and where it was found; the attributes are those of ``Hit``."""

    calibration: Calibration
    layer: str
    path: Path
    current: bool


class Store:
    """The tuning database as layers, asked in order: override, project, user, shipped.

    ====================  ==========================================================================
    override              the argument, or the environment variable ``ADAPTCONV_DB``
    project               ``.adaptconv/`` in the current directory, or in the nearest parent that
                          holds a ``.git`` or a ``pyproject.toml``
    user                  ``$XDG_CACHE_HOME/adaptconv/db``, or ``~/.cache/adaptconv/db``; absent when
                          neither that variable nor ``HOME`` is set: reading then skips it in
                          silence, and only writing complains
    shipped               the package's own ``tuning_db``
    ====================  ==========================================================================

    Environment and current directory are looked at when the layers are first needed, and then no more.

    Args:
        override: directory of the first layer; None takes it from the environment.
        shipped: directory of the last layer; None takes the package's own.
    """

    def __init__(
        self, override: str | os.PathLike[str] | None = None, *, shipped: str | os.PathLike[str] | None = None
    ) -> None:
        self._override = override
        self._shipped = shipped
        self._tidied: set[Path] = set()

    @cached_property
    def layers(self) -> tuple[Layer, ...]:
        """The four layers, in the order in which they are asked."""
        override = self._override if self._override is not None else os.environ.get(ENVIRONMENT) or None
        shipped = Path(self._shipped) if self._shipped is not None else _shipped_root()
        return (
            Layer("override", None if override is None else Path(override).expanduser().absolute()),
            Layer("project", _project_root()),
            Layer("user", _user_root()),
            Layer("shipped", shipped, trusted=True),
        )

    def lookup(self, problem: Problem) -> Hit | None:
        """The first current record of exactly this problem.

        A record measured under another toolchain is no hit: ``neighbours`` offers it instead. The
        backend's version is for the caller to compare.
        """
        key, now = problem.key(), validity_now(problem.device.kind)
        for layer in self.layers:
            row = layer.get(key, problem.device.slug)
            if row is not None and row.validity == now:
                return Hit(row.record, layer.name, row.path, True)
        return None

    def neighbours(self, problem: Problem, limit: int | None = None) -> list[tuple[float, Hit]]:
        """Records of problems of the same family, nearest first; ties in the order of their keys.

        One family: same direction, kind of device, dtype, layout, class of groups, number of axes and
        class of taps. The distance is 0 for this very problem; about 1 for a size doubled; another
        device or thread count and a stale toolchain add a fixed amount. A key found in several layers
        is given once, with the smallest distance.

        Args:
            problem: the problem to find company for.
            limit: most records to return; None for all.
        """
        here, now = parse_key(problem.key()), validity_now(problem.device.kind)
        nearest: dict[str, tuple[float, Row, str]] = {}
        for layer in self.layers:
            for row in layer.family(here.family):
                apart = distance(here, row.features) + (0.0 if row.validity == now else STALE)
                known = nearest.get(row.record.key)
                if known is None or apart < known[0]:
                    nearest[row.record.key] = (apart, row, layer.name)
        count = len(nearest) if limit is None else limit
        ranked = heapq.nsmallest(count, nearest.values(), key=lambda found: (found[0], found[1].record.key))
        return [(apart, Hit(row.record, layer, row.path, row.validity == now)) for apart, row, layer in ranked]

    def records(self) -> Iterator[Hit]:
        """Every record of every layer, in the order in which the layers are asked."""
        for layer in self.layers:
            for row in layer.rows():
                yield Hit(row.record, layer.name, row.path, row.validity == validity_now(row.features.device_kind))

    def calibrations(self, device: Device) -> Iterator[Calibrated]:
        """Every calibration of this very device, threads included, in the order of the layers."""
        now = validity_now(device.kind)
        for layer in self.layers:
            found = layer.calibration(device.slug)
            if found is not None and layer.root is not None:
                path = layer.root / calibrations.file_name(device.slug)
                yield Calibrated(found, layer.name, path, validity(found.toolchain) == now)

    def calibration(self, device: Device) -> Calibrated | None:
        """The first current calibration of this very device: other kernels of torch have other rates."""
        return next((found for found in self.calibrations(device) if found.current), None)

    @property
    def target(self) -> Path | None:
        """The directory that ``write`` writes to: the override if one is set, else the user layer, if any."""
        override, _, user, _ = self.layers
        return override.root if override.root is not None else user.root

    def write(self, record: Record) -> Path:
        """Store a record, replacing an earlier one of the same key; on disk when this returns.

        Returns:
            The file written.

        Raises:
            DatabaseError: there is no directory to write to, it must not be used, or the disk refuses.
                Nothing partial is left, and an earlier record of the key is untouched.
            ValueError: the record's key is not the key of a problem.
        """
        parse_key(record.key)
        return self._put(files.entry_name(record.key), files.encode_entry(record), "a tuning record")

    def write_calibration(self, calibration: Calibration) -> Path:
        """Store a device's calibration, replacing an earlier one; on disk and in force when this returns.

        Returns:
            The file written.

        Raises:
            DatabaseError: as ``write``.
        """
        return self._put(calibrations.file_name(calibration.device), calibrations.encode(calibration), "a calibration")

    def _put(self, name: str, data: bytes, what: str) -> Path:
        target = self.target
        if target is None:
            raise DatabaseError(
                f"nowhere to keep {what}: neither HOME nor XDG_CACHE_HOME names a directory; set {ENVIRONMENT} to one"
            )
        path = target / name
        try:
            files.make_directory(path.parent)
            for folder in (target, path.parent):
                files.check_directory(folder, trusted=False)
            files.write_file(path, data, mode=0o600)
        except Refused as refusal:
            raise DatabaseError(f"{what} cannot be kept in {target}: {refusal}") from None
        except OSError as error:
            failure = DatabaseError(
                f"{what} could not be written to {target}: {error.strerror or error}; "
                f"free the place, or set {ENVIRONMENT} to another directory"
            )
            failure.errno = error.errno
            raise failure from error
        self._tidy(path.parent)
        advance()
        return path

    def digest(self) -> str:
        """A short text that changes whenever what this store would answer changes: for cache keys."""
        return hashlib.sha256("".join(layer.digest() for layer in self.layers).encode()).hexdigest()[:16]

    def _tidy(self, target: Path) -> None:
        """Once a store: remove what killed writers left long ago. Only writers write, so it is done here."""
        if target not in self._tidied:
            self._tidied.add(target)
            with suppress(OSError):  # untidy is not broken
                files.remove_leftovers(target, os.listdir(target), time.time() - _LEFTOVER_S)


# ---- the store of this process ---------------------------------------------------------------

_lock = threading.Lock()
_default: Store | None = None
_epoch = 0


def default_store() -> Store:
    """The store of this process, made at first use."""
    global _default
    with _lock:
        if _default is None:
            _default = Store()
        return _default


def use_database(path: str | os.PathLike[str] | None) -> None:
    """Make a directory the override layer of this process's store.

    Args:
        path: the directory; None goes back to the environment, which is then looked at afresh.
    """
    global _default
    with _lock:
        _default = Store(path)
    advance()


def epoch() -> int:
    """A number that grows whenever a store of this process was written or replaced, or a backend stopped working."""
    return _epoch


def advance() -> None:
    """Make everybody ask again: a store was written or replaced, or what answers can use has changed."""
    global _epoch
    with _lock:
        _epoch += 1


def _user_root() -> Path | None:
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():  # a relative path must be ignored, says the XDG specification
        home = Path(os.environ.get("HOME", ""))  # not Path.home(): it asks the password database
        if not home.is_absolute():
            return None
        cache = home / ".cache"
    return cache / "adaptconv" / "db"


def _project_root() -> Path | None:
    try:
        here = Path.cwd()
    except OSError:  # the current directory was deleted
        return None
    for place in (here, *here.parents):
        folder = place / ".adaptconv"
        try:
            os.lstat(folder)
            present = True
        except OSError:
            present = False
        if present and place == here:
            return folder
        if os.path.exists(place / ".git") or os.path.exists(place / "pyproject.toml"):
            return folder if present else None
    return None


def _shipped_root() -> Path | None:
    from importlib import resources  # not at import: a forward call may never need it

    try:
        return Path(str(resources.files("adaptconv.tuning_db")))
    except ImportError:
        # A source tree that was never installed has the folder beside the package.
        beside = Path(__file__).resolve().parents[2] / "tuning_db"
        return beside if (beside / "__init__.py").exists() else None
