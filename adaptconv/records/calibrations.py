"""Calibrations: the constants of the cost model as measured on one device, a file each.

They live in the folder ``rates`` of a database layer, named by the device's slug (threads included), beside the
records and never among them: listing, merging, comparing and exporting records does not see them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from adaptconv.rates import Rates
from adaptconv.records import files
from adaptconv.records.files import Refused
from adaptconv.records.record import SCHEMA, ForeignSchema, check_date, check_schema, check_toolchain

FOLDER = "rates"
_MAX_BYTES = 1 << 16
_FIELDS = frozenset({"schema", "device", "rates", "toolchain", "measured_on"})


@dataclass(frozen=True, slots=True)
class Calibration:
    """What was measured for one device; checked whenever one is made, like a record.

    Attributes:
        device: slug of the device.
        rates: its constants.
        toolchain: versions it was measured with, as ``toolchain(device)`` gives them.
        measured_on: UTC, ``2026-01-31`` or ``2026-01-31T12:00:00Z``.

    Raises:
        ValueError: a field of the wrong type or out of bounds; the message names it.
    """

    device: str
    rates: Rates
    toolchain: Mapping[str, str] = field(hash=False)
    measured_on: str

    def __post_init__(self) -> None:
        if not isinstance(self.device, str) or not self.device or not _is_slug(self.device):
            raise ValueError(f"device must be the slug of a device, got {ascii(self.device)[:60]}")
        if not isinstance(self.rates, Rates):
            raise ValueError(f"rates must be Rates, got {ascii(self.rates)[:60]}")
        object.__setattr__(self, "toolchain", check_toolchain(self.toolchain))
        check_date(self.measured_on)


def _is_slug(text: str) -> bool:
    return len(text) <= 200 and all(c.isalnum() or c == "-" for c in text)


def file_name(slug: str) -> str:
    """Where a layer keeps the calibration of a device, relative to its root."""
    return f"{FOLDER}/{slug}.json"


def encode(calibration: Calibration) -> bytes:
    """The content of a calibration's file: JSON made to be read."""
    content = {
        "schema": SCHEMA, "device": calibration.device, "rates": calibration.rates.to_json(),
        "toolchain": dict(calibration.toolchain), "measured_on": calibration.measured_on,
    }  # fmt: skip
    return json.dumps(content, indent=1, allow_nan=False).encode() + b"\n"


def decode(data: bytes, slug: str) -> Calibration:
    """Read the content of the calibration of a device back.

    Raises:
        Refused: it is damaged, absurd, another device's, or not for this version.
    """
    try:
        obj = files.decode_json(data)
        check_schema(obj)
        if obj.keys() != _FIELDS:
            raise ValueError(f"a calibration has exactly the fields {', '.join(sorted(_FIELDS))}")
        made = Calibration(obj["device"], Rates.from_json(obj["rates"]), obj["toolchain"], obj["measured_on"])
        if made.device != slug:
            raise ValueError(f"the rates of {made.device} in the file of {slug}")
    except ForeignSchema as error:
        raise Refused("foreign schema", str(error)) from None
    except ValueError as error:
        raise Refused("damaged", f"{error}; delete the file or run adaptconv doctor --calibrate") from None
    return made


def read(root: Path, slug: str, *, trusted: bool) -> Calibration | None:
    """The calibration of a device in a layer, None if there is none.

    Raises:
        Refused: it cannot be used.
    """
    if not files.check_directory(root / FOLDER, trusted=trusted):
        return None
    data = files.read_file(root / file_name(slug), _MAX_BYTES, trusted=trusted)
    return None if data is None else decode(data, slug)


def names(root: Path) -> list[str]:
    """Every calibration file of a layer, sorted, relative to its root; none if there is no such folder."""
    try:
        return sorted(f"{FOLDER}/{path.name}" for path in (root / FOLDER).iterdir() if path.suffix == ".json")
    except OSError:
        return []


def faults(root: Path) -> list[str]:
    """Everything that is wrong with the calibrations of a directory, a line each."""
    found = []
    for name in names(root):
        try:
            # The user named this directory, so its owner and mode are not in question.
            read(root, Path(name).stem, trusted=True)
        except Refused as refusal:
            found.append(f"{root / name}: {refusal}")
    return found
