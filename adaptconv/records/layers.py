"""One layer of the database: a directory of entries and packs that is read without ever raising."""

from __future__ import annotations

import hashlib
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from adaptconv.records import calibrations, files
from adaptconv.records.calibrations import Calibration
from adaptconv.records.files import Refused
from adaptconv.records.keys import Family, Features, parse_key
from adaptconv.records.record import Record
from adaptconv.records.toolchain import Validity, validity

# A directory changed less than this before it was listed may change again within the same tick of
# the file system's clock, unseen: such a listing is not reused.
_TICK_NS = 100_000_000

_warned: set[tuple[str, str]] = set()


class DatabaseWarning(UserWarning):
    """Part of the tuning database cannot be used; the next layer is asked instead."""


@dataclass(frozen=True, slots=True)
class Row:
    """A record as a layer holds it.

    Attributes:
        features: its key, read back.
        record: the record.
        validity: what must match the toolchain here for the record to be current.
        path: the file it came from.
    """

    features: Features
    record: Record
    validity: Validity
    path: Path

    @staticmethod
    def of(record: Record, path: Path) -> Row:
        """Index a record.

        Raises:
            ValueError: its key is not the key of a problem.
        """
        return Row(parse_key(record.key), record, validity(record.toolchain), path)


@dataclass(slots=True)
class _Pack:
    """A pack as parsed: thousands of rows, of which a look-up needs one, so each is checked when asked for."""

    path: Path
    device: str
    raw: dict[str, object]
    rows: dict[str, Row | None]


Stamp = tuple[int, int, int]  # inode, size, modification time: changes whenever a file is replaced


class Layer:
    """A directory of entries (one record, named by the hash of its key) and packs (one device's records).

    Anything damaged, foreign or unsafe in it is refused with one warning for the directory and the
    class of reason, for the life of the process; nothing here raises and nothing here writes.

    Attributes:
        name: "override", "project", "user" or "shipped".
        root: the directory; None where this layer does not exist.
        trusted: whether owner, mode and links are left unchecked (files installed with the package).
    """

    def __init__(self, name: str, root: Path | None, *, trusted: bool = False) -> None:
        self.name = name
        self.root = root
        self.trusted = trusted
        self._listing: tuple[int, dict[str, Stamp]] | None = None
        self._rows: dict[str, tuple[Stamp, list[Row]]] = {}
        self._packs: dict[str, tuple[Stamp, _Pack]] = {}
        self._families: dict[str, tuple[dict[str, Stamp], dict[Family, list[Row]]]] = {}

    def get(self, key: str, device: str) -> Row | None:
        """The row with this key, which names the device with this slug; None if there is none.

        Reads one entry, or the device's pack; the directory is not listed.
        """
        if self.root is None or not self._usable():
            return None
        name = files.entry_name(key)
        rows = self._read(name)
        if rows:
            return rows[0]
        name = f"{device}.json"
        return self._row(self._pack(name), key, name)

    def calibration(self, device: str) -> Calibration | None:
        """The measured constants of the device with this slug; None if there are none."""
        if self.root is None or not self._usable():
            return None
        try:
            return calibrations.read(self.root, device, trusted=self.trusted)
        except Refused as refusal:
            self._refuse(refusal, calibrations.file_name(device))
            return None

    def rows(self, kind: str | None = None) -> Iterator[Row]:
        """Every row, or every row that may be of a kind of device ("cpu", "cuda", ...)."""
        for name, stamp in self._files().items():
            if files.is_entry_name(name):
                yield from self._entry(name, stamp)
            elif kind is None or name.startswith(f"{kind}-"):
                pack = self._pack(name)
                yield from (row for key in pack.raw if (row := self._row(pack, key, name)) is not None)

    def family(self, family: Family) -> list[Row]:
        """The rows of one family of problems."""
        kind = family[1]
        listing = self._files()
        known = self._families.get(kind)
        if known is None or known[0] is not listing:
            families: dict[Family, list[Row]] = {}
            if known is not None and known[0] == listing:
                families = known[1]  # listed anew, and nothing had changed
            else:
                for row in self.rows(kind):
                    families.setdefault(row.features.family, []).append(row)
            known = self._families[kind] = (listing, families)
        return known[1].get(family, [])

    def state(self) -> str:
        """One line for people: "absent", "ready", or why it is refused."""
        if self.root is None:
            return "absent"
        try:
            return "ready" if files.check_directory(self.root, trusted=self.trusted) else "absent"
        except Refused as refusal:
            return f"refused, {refusal}"

    def digest(self) -> str:
        """Changes whenever what this layer would answer changes.

        Entries count by name, size and time; files installed with the package by content, so that
        every machine with the same package agrees.
        """
        content = hashlib.sha256(self.name.encode())
        for name, stamp in sorted({**self._files(), **self._calibrations()}.items()):
            if self.trusted and self.root is not None:
                try:
                    data = files.read_file(self.root / name, files.MAX_PACK_BYTES, trusted=True)
                except Refused:
                    data = None
                content.update(f"{name} {hashlib.sha256(data or b'').hexdigest()}\n".encode())
            else:
                content.update(f"{name} {stamp}\n".encode())
        return content.hexdigest()

    # ---- reading ------------------------------------------------------------------------------

    def _refuse(self, refusal: Refused, name: str | None = None) -> None:
        place = str(self.root if self.root is None or name is None else (self.root / name).parent)
        if (place, refusal.reason) in _warned:
            return
        _warned.add((place, refusal.reason))  # first, so that a warning turned into an error is not repeated
        what = str(self.root) if name is None else f"{name} in {self.root}"
        warnings.warn(
            f"adaptconv ignores {what} ({self.name} tuning database): {refusal.reason}: {refusal.detail}. "
            "Said once; results stay correct, the next layer is asked.",
            DatabaseWarning,
            stacklevel=2,
        )

    def _usable(self) -> bool:
        if self.root is None:
            return False
        try:
            return files.check_directory(self.root, trusted=self.trusted)
        except Refused as refusal:
            self._refuse(refusal)
            return False

    def _files(self) -> dict[str, Stamp]:
        """Name and stamp of every JSON file, sorted by name; listed anew when the directory changed."""
        if self.root is None or not self._usable():
            return {}
        try:
            changed = os.stat(self.root).st_mtime_ns
            if self._listing is not None and self._listing[0] == changed:
                return self._listing[1]
            now = time.time_ns()
            with os.scandir(self.root) as entries:
                found = {e.name: _stamp(e.stat(follow_symlinks=False)) for e in entries if e.name.endswith(".json")}
        except OSError as error:
            self._refuse(Refused("unreadable", error.strerror or str(error)))
            return {}
        listing = dict(sorted(found.items()))
        if now - changed > _TICK_NS:
            self._listing = (changed, listing)
        return listing

    def _calibrations(self) -> dict[str, Stamp]:
        """Name and stamp of every calibration."""
        found: dict[str, Stamp] = {}
        if self.root is not None and self._usable():
            for name in calibrations.names(self.root):
                with suppress(OSError):  # gone since it was listed
                    found[name] = _stamp(os.stat(self.root / name, follow_symlinks=False))
        return found

    def _entry(self, name: str, stamp: Stamp) -> list[Row]:
        """The row of one entry as an index holds it, read again when its stamp changed."""
        known = self._rows.get(name)
        if known is None or known[0] != stamp:
            known = self._rows[name] = (stamp, self._read(name))
        return known[1]

    def _read(self, name: str) -> list[Row]:
        assert self.root is not None
        path = self.root / name
        try:
            data = files.read_file(path, files.MAX_ENTRY_BYTES, trusted=self.trusted)
            return [] if data is None else [Row.of(files.decode_entry(data, name), path)]
        except Refused as refusal:
            self._refuse(refusal, name)
        except ValueError as error:
            self._refuse(Refused("damaged", str(error)), name)
        return []

    def _pack(self, name: str) -> _Pack:
        assert self.root is not None
        path = self.root / name
        try:
            stamp = _stamp(os.stat(path, follow_symlinks=self.trusted))
        except OSError:
            stamp = (0, 0, 0)  # read_file says why, if it is anything but absence
        known = self._packs.get(name)
        if known is None or known[0] != stamp:
            known = self._packs[name] = (stamp, self._read_pack(name))
        return known[1]

    def _read_pack(self, name: str) -> _Pack:
        assert self.root is not None
        path = self.root / name
        pack = _Pack(path, "", {}, {})
        try:
            data = files.read_file(path, files.MAX_PACK_BYTES, trusted=self.trusted)
            if data is not None:
                pack.device, rows = files.decode_pack(data)
                for row in rows:
                    key = row.get("key") if isinstance(row, dict) else None
                    if not isinstance(key, str):
                        raise Refused("damaged", "a row without a key")
                    pack.raw[key] = row
        except Refused as refusal:
            self._refuse(refusal, name)
        return pack

    def _row(self, pack: _Pack, key: str, name: str) -> Row | None:
        """A row of a pack, checked when it is first asked for."""
        if key in pack.raw and key not in pack.rows:
            pack.rows[key] = None
            try:
                pack.rows[key] = Row.of(files.pack_record(pack.device, pack.raw[key]), pack.path)
            except ValueError as error:
                self._refuse(Refused("damaged row", str(error)), name)
        return pack.rows.get(key)


def _stamp(found: os.stat_result) -> Stamp:
    return found.st_ino, found.st_size, found.st_mtime_ns
