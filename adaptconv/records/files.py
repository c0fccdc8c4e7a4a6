"""Files of the database: checked when read, atomic when written, plain JSON always.

Two kinds: an *entry* holds one record and a checksum, and is named by the hash of its key; a *pack*
holds the records of one device, sorted by key, and is named by the device's slug.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from adaptconv.records.keys import parse_key
from adaptconv.records.record import SCHEMA, ForeignSchema, Record, check_schema

MAX_ENTRY_BYTES = 1 << 18
MAX_PACK_BYTES = 1 << 26

_NAME_DIGITS = 32
_HEAD, _MIDDLE, _END = b'{"record":', b',"sha256":"', b'"}\n'
# Windows has neither owners nor these flags; what they protect against does not arise there.
_NO_FOLLOW: int = getattr(os, "O_NOFOLLOW", 0)
_NON_BLOCKING: int = getattr(os, "O_NONBLOCK", 0)  # opening a pipe must not wait for its writer


class Refused(Exception):
    """A file or directory that must not be used.

    Attributes:
        reason: a short class of reasons; warnings are given once for each.
        detail: what was found and what to do, in words.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def entry_name(key: str) -> str:
    """The file name of a key's entry."""
    return hashlib.sha256(key.encode()).hexdigest()[:_NAME_DIGITS] + ".json"


def is_entry_name(name: str) -> bool:
    """Whether a file name is that of an entry (a pack's begins with a kind of device and has dashes)."""
    stem, dot, suffix = name.partition(".")
    return len(stem) == _NAME_DIGITS and dot + suffix == ".json" and set(stem) <= set("0123456789abcdef")


def encode_entry(record: Record) -> bytes:
    """The content of a record's entry."""
    return _sealed(_canonical(record.to_json()))


def decode_entry(data: bytes, name: str) -> Record:
    """Read the content of an entry back.

    Args:
        data: the file's content.
        name: the file's name, which must be that of the key inside.

    Raises:
        Refused: it is not intact, or not for this version.
    """
    try:
        obj = decode_json(data)
        if "record" not in obj or "sha256" not in obj:
            check_schema(obj)
            raise ValueError("an entry has a record and its checksum")
        record = Record.from_json(obj["record"])
        # The bytes are what is sealed: comparing them spares encoding the record again.
        if data != _sealed(data[len(_HEAD) : -len(_MIDDLE) - _NAME_DIGITS - len(_END)]):
            raise ValueError("the checksum does not match the content")
        if entry_name(record.key) != name:
            raise ValueError("the file is named for another problem")
    except ForeignSchema as error:
        raise Refused("foreign schema", str(error)) from None
    except ValueError as error:
        raise Refused("damaged", f"{error}; delete the file or tune again") from None
    return record


def encode_pack(device: str, records: Iterable[Record]) -> bytes:
    """The content of a device's pack: sorted by key, one record a line, so that versions can be compared."""
    lines = [_canonical(record.to_json()) for record in sorted(records, key=lambda record: record.key)]
    head = b'{"schema":%d,"device":%s,"records":[' % (SCHEMA, _canonical(device))
    return head + (b"\n" + b",\n".join(lines) + b"\n" if lines else b"") + b"]}\n"


def decode_pack(data: bytes) -> tuple[str, list[object]]:
    """Read the content of a pack back, its rows still to be checked by ``pack_record``.

    Returns:
        The device's slug, and the rows.

    Raises:
        Refused: the pack as a whole is damaged or not for this version.
    """
    try:
        obj = decode_json(data)
        check_schema(obj)
        device, rows = obj.get("device"), obj.get("records")
        if not isinstance(device, str) or not isinstance(rows, list):
            raise ValueError("a pack has a device and a list of records")
    except ForeignSchema as error:
        raise Refused("foreign schema", str(error)) from None
    except ValueError as error:
        raise Refused("damaged", str(error)) from None
    return device, rows


def pack_record(device: str, row: object) -> Record:
    """Check one row of the pack of a device.

    Raises:
        ValueError: it is not a record, or not of this device.
    """
    record = Record.from_json(row)
    theirs = parse_key(record.key).device
    if theirs != device:
        raise ValueError(f"a record of {theirs} in the pack of {device}")
    return record


def decode_json(data: bytes) -> dict[str, Any]:
    """Parse a JSON object, strictly.

    Raises:
        ValueError: not UTF-8, not JSON, not an object, or holding NaN or an infinity.
    """
    try:
        obj = json.loads(data.decode(), parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(obj, dict):
        raise ValueError("expected a JSON object")
    return obj


def check_directory(path: Path, *, trusted: bool) -> bool:
    """Whether a directory is there and may be used.

    Args:
        path: the directory.
        trusted: skip the checks of owner, mode and links (for files installed with the package).

    Returns:
        False if nothing is there.

    Raises:
        Refused: something is there that must not be used.
    """
    try:
        found = os.stat(path) if trusted else os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise Refused("unreadable", error.strerror or str(error)) from None
    if stat.S_ISLNK(found.st_mode):
        raise Refused("symbolic link", "a database directory must not be a symbolic link; name its target instead")
    if not stat.S_ISDIR(found.st_mode):
        raise Refused("not a directory", "a database is a directory of JSON files")
    if not trusted:
        _check_owner(found)
    return True


def read_file(path: Path, limit: int, *, trusted: bool) -> bytes | None:
    """The content of a file, or None if nothing is there.

    Args:
        path: the file.
        limit: most bytes to accept.
        trusted: skip the checks of owner, mode and links.

    Raises:
        Refused: it cannot be read or must not be used.
    """
    flags = os.O_RDONLY | _NON_BLOCKING | (0 if trusted else _NO_FOLLOW)
    try:
        descriptor = os.open(path, flags)
        try:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise Refused("not a file", "expected a plain file")
            if not trusted:
                _check_owner(found)
            data = b""
            while len(data) <= limit and (more := os.read(descriptor, limit + 1 - len(data))):
                data += more
        finally:
            os.close(descriptor)
    except FileNotFoundError:
        return None
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EMLINK):
            raise Refused("symbolic link", "a database file must not be a symbolic link") from None
        raise Refused("unreadable", error.strerror or str(error)) from None
    if len(data) > limit:
        raise Refused("too large", f"more than {limit} bytes")
    return data


def write_file(path: Path, data: bytes, *, mode: int) -> None:
    """Put a file in place whole or not at all, on disk before this returns.

    Args:
        path: where; its directory must exist.
        data: what.
        mode: permission bits, less the process's umask.

    Raises:
        OSError: it could not be written; nothing is left behind and an earlier file is untouched.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW, mode)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    # The content is safe; this makes its name survive a power cut where the file system can promise that.
    with suppress(OSError):
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def make_directory(path: Path) -> None:
    """Create a directory and its missing parents, for this user alone (mode 0700).

    Raises:
        OSError: it cannot be created.
    """
    missing: list[Path] = []
    while not path.exists():
        missing.append(path)
        path = path.parent
    for part in reversed(missing):
        with suppress(FileExistsError):  # another process was faster
            part.mkdir(mode=0o700)


def remove_leftovers(directory: Path, names: Sequence[str], older_than: float) -> None:
    """Delete the temporary files that killed writers left before ``older_than`` (seconds since the epoch)."""
    for name in names:
        if name.startswith(".") and name.endswith(".tmp"):
            with suppress(OSError):
                if os.lstat(directory / name).st_mtime < older_than:
                    os.unlink(directory / name)


def _check_owner(found: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid not in (os.geteuid(), 0):  # root could read and write anything anyhow
        raise Refused("foreign owner", f"it belongs to user {found.st_uid}, not to you")
    if found.st_mode & 0o022:
        raise Refused("writable by others", f"its mode is {stat.S_IMODE(found.st_mode):04o}; chmod go-w it to use it")


def _canonical(obj: object) -> bytes:
    return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _sealed(body: bytes) -> bytes:
    checksum = hashlib.sha256(body).hexdigest()[:_NAME_DIGITS]
    return _HEAD + body + _MIDDLE + checksum.encode() + _END


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")
