"""Packs: records gathered into one file a device, merged, compared and verified."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from adaptconv.records import calibrations, files
from adaptconv.records.files import Refused
from adaptconv.records.keys import parse_key
from adaptconv.records.record import Record
from adaptconv.records.store import Store


@dataclass(frozen=True, slots=True)
class Conflict:
    """Two different records of one key.

    Attributes:
        kept: the one measured later.
        dropped: the other.
    """

    kept: Record
    dropped: Record

    def __str__(self) -> str:
        """Both sides, in one line."""
        return f"{self.kept.key}: kept {_brief(self.kept)}; dropped {_brief(self.dropped)}"


@dataclass(frozen=True, slots=True)
class Merged:
    """Records of several files as one set.

    Attributes:
        records: one a key, sorted by key.
        conflicts: where sources disagreed, sorted by key.
    """

    records: tuple[Record, ...]
    conflicts: tuple[Conflict, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """How two sets of records differ.

    Attributes:
        only_a: records whose key only the first has.
        only_b: records whose key only the second has.
        changed: pairs of different records of one key.
    """

    only_a: tuple[Record, ...]
    only_b: tuple[Record, ...]
    changed: tuple[tuple[Record, Record], ...]

    def __bool__(self) -> bool:
        """Whether there is any difference."""
        return bool(self.only_a or self.only_b or self.changed)

    def __str__(self) -> str:
        """One line a record, like a patch: ``-`` first only, ``+`` second only, ``~`` changed."""
        lines = [f"- {record.key}: {_brief(record)}" for record in self.only_a]
        lines += [f"+ {record.key}: {_brief(record)}" for record in self.only_b]
        lines += [f"~ {a.key}: {_brief(a)} -> {_brief(b)}" for a, b in self.changed]
        return "\n".join(lines)


def combine(records: Iterable[Record]) -> Merged:
    """Keep one record a key, the one measured last; the order of the records does not matter."""
    versions: dict[str, dict[bytes, Record]] = {}
    for record in records:
        versions.setdefault(record.key, {})[files.encode_entry(record)] = record
    kept: list[Record] = []
    conflicts: list[Conflict] = []
    for _, found in sorted(versions.items()):
        # The content breaks a tie of dates: arbitrary, but the same on every machine.
        ranked = sorted(found, key=lambda text: (found[text].measured_on, text))
        *dropped, last = (found[text] for text in ranked)
        kept.append(last)
        conflicts += [Conflict(last, record) for record in dropped]
    return Merged(tuple(kept), tuple(conflicts))


def merge(*paths: Path) -> Merged:
    """Read packs, or directories of packs and entries, as one set of records.

    Raises:
        ValueError: a path is missing, or holds anything that is not intact.
    """
    return combine(record for path in paths for record in _intact(path))


def diff(a: Path, b: Path) -> Difference:
    """Compare two packs, or directories of packs and entries.

    Raises:
        ValueError: a path is missing, or holds anything that is not intact.
    """
    left = {record.key: record for record in merge(a).records}
    right = {record.key: record for record in merge(b).records}
    return Difference(
        tuple(left[key] for key in sorted(left.keys() - right.keys())),
        tuple(right[key] for key in sorted(right.keys() - left.keys())),
        tuple((left[key], right[key]) for key in sorted(left.keys() & right.keys()) if left[key] != right[key]),
    )


def verify(path: Path) -> list[str]:
    """Everything that is wrong with a pack, or with a directory of packs and entries, a line each.

    An entry must be intact and named for its key; a pack must be intact, named for its device,
    sorted by key, and free of repeated keys. A directory's calibrations are read too.
    """
    return _read(path)[1] + calibrations.faults(path)


def write_packs(records: Iterable[Record], directory: Path) -> list[Path]:
    """Write one pack a device into a directory, which is created if need be; earlier packs are replaced.

    Returns:
        The files, sorted.

    Raises:
        OSError: a file could not be written; it is then as it was.
        ValueError: a record's key is not the key of a problem.
    """
    devices: dict[str, list[Record]] = {}
    for record in combine(records).records:
        devices.setdefault(parse_key(record.key).device, []).append(record)
    directory.mkdir(parents=True, exist_ok=True)
    written = []
    for device, theirs in sorted(devices.items()):
        path = directory / f"{device}.json"
        files.write_file(path, files.encode_pack(device, theirs), mode=0o644)
        written.append(path)
    return written


def export_shipped(
    store: Store, directory: Path, layers: Iterable[str] = ("override", "project", "user")
) -> tuple[list[Path], tuple[Conflict, ...]]:
    """Add a store's records to the packs in a directory, such as the repository's ``tuning_db``.

    Args:
        store: where the records come from.
        directory: where the packs are, or will be.
        layers: names of the layers to take.

    Returns:
        The packs written, and where the store and the packs disagreed.

    Raises:
        OSError: a pack could not be written.
        ValueError: a pack that is already there is not intact; nothing is written then.
    """
    wanted = frozenset(layers)
    fresh = [hit.record for hit in store.records() if hit.layer in wanted]
    present: list[Record] = []
    for device in sorted({parse_key(record.key).device for record in fresh}):
        pack = directory / f"{device}.json"
        if pack.exists():
            present += _intact(pack)
    merged = combine([*present, *fresh])
    return write_packs(merged.records, directory), merged.conflicts


def _intact(path: Path) -> list[Record]:
    records, faults = _read(path)
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"{faults[0]}{more}")
    return records


def _read(path: Path) -> tuple[list[Record], list[str]]:
    """Every intact record at a path, and every fault in words."""
    if not path.is_dir():
        return _read_one(path, named=False)
    records: list[Record] = []
    faults: list[str] = []
    for file in sorted(path.glob("*.json")):
        theirs, wrong = _read_one(file, named=True)
        records += theirs
        faults += wrong
    return records, faults


def _read_one(path: Path, *, named: bool) -> tuple[list[Record], list[str]]:
    records: list[Record] = []
    faults: list[str] = []
    try:
        # The user named this file, so its owner and mode are not in question.
        data = files.read_file(path, files.MAX_PACK_BYTES, trusted=True)
        if data is None:
            raise Refused("missing", "there is no such file")
        if files.is_entry_name(path.name):
            record = files.decode_entry(data, path.name)
            parse_key(record.key)
            return [record], []
        device, rows = files.decode_pack(data)
    except Refused as refusal:
        return [], [f"{path}: {refusal}"]
    except ValueError as error:
        return [], [f"{path}: {error}"]
    if named and path.name != f"{device}.json":
        faults.append(f"{path}: named for another device than its own, {device}")
    last = ""
    for i, row in enumerate(rows):
        try:
            record = files.pack_record(device, row)
        except ValueError as error:
            faults.append(f"{path}: row {i}: {error}")
            continue
        if record.key <= last:
            faults.append(f"{path}: row {i}: {'repeated' if record.key == last else 'out of order'}: {record.key}")
        last = record.key
        records.append(record)
    return records, faults


def _brief(record: Record) -> str:
    knobs = ",".join(f"{name}={value}" for name, value in record.config.items())
    return f"{record.backend}@{record.version}{{{knobs}}} {record.p20_us:.1f} us on {record.measured_on}"
