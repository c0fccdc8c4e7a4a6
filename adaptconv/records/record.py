"""Record: what was measured for one problem. It can only name things, and it checks itself."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import Any

Value = str | int | bool

SCHEMA = 1
MAX_KEY = 1 << 16  # a key spells every position of an irregular window, so it can be long
_MAX_TEXT = 1024
_MAX_ITEMS = 64
_WORD = re.compile(r"\w{1,64}", re.ASCII)
_WHEN = re.compile(r"\d{4}-\d\d-\d\d(T\d\d:\d\d:\d\dZ)?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Rival:
    """The best another backend did in the same run, kept to explain the decision.

    Attributes:
        choice: canonical text of the backend and its configuration.
        p20_us: its 20th percentile in microseconds.

    Raises:
        ValueError: a field of the wrong type or out of bounds.
    """

    choice: str
    p20_us: float

    def __post_init__(self) -> None:
        _text("rivals: choice", self.choice, _MAX_TEXT)
        object.__setattr__(self, "p20_us", _number("rivals: p20_us", self.p20_us))


@dataclass(frozen=True, slots=True)
class Record:
    """The fastest sound way found to compute one problem on one device.

    A record is data that may come from anywhere, so it is checked whenever one is made: it names a
    backend and knob values and can carry nothing else. Whether that backend is registered and
    declares those values is for dispatch to say. Treat the mappings as immutable.

    Attributes:
        key: ``Problem.key()``, the device included.
        backend: name of the backend that won.
        version: version of that backend.
        config: its knobs, sorted by name.
        p20_us: 20th percentile of its time in microseconds.
        median_us: median of its time in microseconds.
        p80_us: 80th percentile of its time in microseconds.
        native_us: 20th percentile of plain native in the same run, in microseconds.
        error: relative L2 error against the oracle.
        native_error: relative L2 error of plain native against the oracle.
        toolchain: versions it was measured with, as ``toolchain(device)`` gives them.
        measured_on: UTC, ``2026-01-31`` or ``2026-01-31T12:00:00Z`` (see ``utc_now``).
        rivals: the best of each other backend.

    Raises:
        ValueError: a field of the wrong type or out of bounds; the message names it.
    """

    key: str
    backend: str
    version: int
    config: dict[str, Value] = field(hash=False)
    p20_us: float
    median_us: float
    p80_us: float
    native_us: float
    error: float
    native_error: float
    toolchain: dict[str, str] = field(hash=False)
    measured_on: str
    rivals: tuple[Rival, ...] = ()

    def __post_init__(self) -> None:
        _text("key", self.key, MAX_KEY)
        _word("backend", self.backend)
        if type(self.version) is not int or not 0 <= self.version < 1 << 31:
            raise ValueError(f"version must be a non-negative int, got {_shown(self.version)}")
        object.__setattr__(self, "config", _config(self.config))
        for name in _TIMES_AND_ERRORS:
            object.__setattr__(self, name, _number(name, getattr(self, name)))
        object.__setattr__(self, "toolchain", check_toolchain(self.toolchain))
        check_date(self.measured_on)
        if not isinstance(self.rivals, tuple) or len(self.rivals) > _MAX_ITEMS:
            raise ValueError(f"rivals must be a tuple of at most {_MAX_ITEMS}, got {_shown(self.rivals)}")
        if not all(isinstance(rival, Rival) for rival in self.rivals):
            raise ValueError(f"rivals must be Rival objects, got {_shown(self.rivals)}")

    def to_json(self) -> dict[str, Any]:
        """The record as what JSON can hold: ``Record.from_json`` reads it back unchanged."""
        values: dict[str, Any] = {name: getattr(self, name) for name in _FIELDS}
        values["config"], values["toolchain"] = dict(self.config), dict(self.toolchain)
        values["rivals"] = [{"choice": rival.choice, "p20_us": rival.p20_us} for rival in self.rivals]
        return {"schema": SCHEMA, **values}

    @staticmethod
    def from_json(obj: object) -> Record:
        """Read what ``to_json`` wrote, strictly: every field once, of its type, and no other.

        Raises:
            ForeignSchema: the record was written under another schema (a ValueError).
            ValueError: anything else that is not a record; the message says what.
        """
        if not isinstance(obj, dict):
            raise ValueError(f"a record must be a JSON object, got {_shown(obj)}")
        check_schema(obj)
        if obj.keys() != _JSON_FIELDS:
            odd = sorted(map(str, obj.keys() ^ _JSON_FIELDS))
            raise ValueError(f"a record has exactly the fields {', '.join(sorted(_JSON_FIELDS))}; at odds: {odd[:5]}")
        rivals = obj["rivals"]
        if not isinstance(rivals, list) or not all(
            isinstance(rival, dict) and rival.keys() == {"choice", "p20_us"} for rival in rivals
        ):
            raise ValueError(f"rivals must be a list of {{choice, p20_us}}, got {_shown(rivals)}")
        values = {name: obj[name] for name in _FIELDS}
        values["rivals"] = tuple(Rival(**rival) for rival in rivals)
        return Record(**values)


class ForeignSchema(ValueError):
    """Data of another schema: not damaged, but not for this version of adaptconv."""


def check_schema(obj: Mapping[str, object]) -> None:
    """Accept only what was written under this schema.

    Raises:
        ForeignSchema: the object's ``schema`` is not ``SCHEMA``.
    """
    schema = obj.get("schema")
    if type(schema) is not int or schema != SCHEMA:
        raise ForeignSchema(f"schema {_shown(schema)} is not the schema {SCHEMA} that this version reads")


def utc_now() -> str:
    """Give this second in UTC, in the form ``Record.measured_on`` takes."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


_FIELDS = tuple(f.name for f in fields(Record))
_JSON_FIELDS = frozenset({"schema", *_FIELDS})
_TIMES_AND_ERRORS = ("p20_us", "median_us", "p80_us", "native_us", "error", "native_error")


def _shown(value: object) -> str:
    """A value for an error message: a hostile file must not fill the screen."""
    text = ascii(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _text(name: str, value: object, limit: int) -> str:
    # isprintable also refuses control characters and lone surrogates, which cannot be written as UTF-8.
    if not isinstance(value, str) or not 0 < len(value) <= limit or not value.isprintable():
        raise ValueError(f"{name} must be 1 to {limit} printable characters, got {_shown(value)}")
    return value


def _word(name: str, value: object) -> str:
    if not isinstance(value, str) or _WORD.fullmatch(value) is None:
        raise ValueError(f"{name} must be a plain word, got {_shown(value)}")
    return value


def _number(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number, got {_shown(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{name} must be finite and not negative, got {_shown(value)}")
    return number


def _config(value: object) -> dict[str, Value]:
    if not isinstance(value, Mapping) or len(value) > _MAX_ITEMS:
        raise ValueError(f"config must map at most {_MAX_ITEMS} knobs to values, got {_shown(value)}")
    for name, setting in value.items():
        _word("config: knob", name)
        if type(setting) is str:
            _text(f"config: {name}", setting, 128)
            if set(setting) & set("{}=,"):  # these delimit the canonical text of a choice
                raise ValueError(f"config: {name} must not contain '{{', '}}', '=' or ',', got {_shown(setting)}")
        elif type(setting) is int:
            if abs(setting) >= 1 << 63:
                raise ValueError(f"config: {name} must fit in 64 bits, got {_shown(setting)}")
        elif type(setting) is not bool:
            raise ValueError(f"config: {name} must be a str, an int or a bool, got {_shown(setting)}")
    return dict(sorted(value.items()))


def check_toolchain(value: object) -> dict[str, str]:
    """A toolchain as records keep it, sorted by name.

    Raises:
        ValueError: it does not map names to versions.
    """
    if not isinstance(value, Mapping) or len(value) > _MAX_ITEMS:
        raise ValueError(f"toolchain must map at most {_MAX_ITEMS} names to versions, got {_shown(value)}")
    for name, version in value.items():
        _word("toolchain: name", name)
        _text(f"toolchain: {name}", version, 128)
    return dict(sorted(value.items()))


def check_date(value: object) -> None:
    """Accept a date or a second in UTC, as ``utc_now`` gives it.

    Raises:
        ValueError: it is neither.
    """
    if not isinstance(value, str) or _WHEN.fullmatch(value) is None:
        raise ValueError(f"measured_on must look like 2026-01-31 or 2026-01-31T12:00:00Z, got {_shown(value)}")
    try:
        datetime.fromisoformat(value.removesuffix("Z"))
    except ValueError:
        raise ValueError(f"measured_on is not a date: {_shown(value)}") from None
