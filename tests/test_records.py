"""Laws of the tuning database: it survives what files and machines do, and it can only name things."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptconv.problem import Device, Direction, Problem
from adaptconv.records import (
    DatabaseError,
    DatabaseWarning,
    ForeignSchema,
    Record,
    Rival,
    Store,
    combine,
    default_store,
    diff,
    distance,
    epoch,
    export_shipped,
    files,
    is_current,
    layers,
    merge,
    parse_key,
    store,
    toolchain,
    use_database,
    utc_now,
    verify,
    write_packs,
)
from adaptconv.records.keys import OTHER_DEVICE, OTHER_THREADS, STALE
from adaptconv.taps import TapPattern

CPU = torch.device("cpu")
HERE = Device("cpu", "Testor 9000 AVX2", 2)


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No layer but those a test makes, every warning fresh, and any warning a test does not expect an error."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("ADAPTCONV_DB", raising=False)
    monkeypatch.chdir(home)
    monkeypatch.setattr(layers, "_warned", set())
    monkeypatch.setattr(store, "_default", None)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DatabaseWarning)
        yield


def a_problem(**changes: Any) -> Problem:
    base = Problem(
        Direction.FORWARD, 2, 8, 16, 1, (32, 32), TapPattern.grid((3, 3), 2), (1, 1), ((2, 2), (2, 2)),
        "float32", "contiguous", HERE,
    )  # fmt: skip
    return replace(base, **changes)


def a_record(problem: Problem | None = None, **changes: Any) -> Record:
    values: dict[str, Any] = {
        "key": (problem or a_problem()).key(),
        "backend": "gather",
        "version": 3,
        "config": {"form": "rows", "workspace_mib": 64, "chunked": True},
        "p20_us": 10.5,
        "median_us": 11.0,
        "p80_us": 12.25,
        "native_us": 20.0,
        "error": 1.5e-7,
        "native_error": 1.25e-7,
        "toolchain": toolchain(CPU),
        "measured_on": "2026-01-31T12:00:00Z",
        "rivals": (Rival("native@1{layout=keep}", 20.0), Rival("dense@1{}", 31.5)),
    }
    return Record(**{**values, **changes})


def a_store(root: Path, shipped: Path | None = None) -> Store:
    return Store(root, shipped=shipped or root.parent / "nothing-shipped")


def only_json(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ---- keys ------------------------------------------------------------------------------------


def some_patterns() -> Iterator[TapPattern]:
    rng = random.Random(7)
    for axes in (1, 2, 3):
        yield TapPattern.grid((1,) * axes)
        yield TapPattern.grid((3,) * axes, tuple(range(1, axes + 1)))
        yield TapPattern.partial((3,) * axes, (2,) * axes, 2)
        for _ in range(150):
            window = tuple(rng.randint(1, 5) for _ in range(axes))
            everywhere = list(itertools.product(*map(range, window)))
            yield TapPattern(tuple(rng.sample(everywhere, rng.randint(0, min(4, len(everywhere))))), window)


def test_a_key_reads_back_as_its_problem() -> None:
    seen = set()
    for i, taps in enumerate(some_patterns()):
        axes = taps.axes
        problem = a_problem(
            direction=list(Direction)[i % 3], batch=i % 5, c_in=8, c_out=12, groups=(1, 4, 8)[i % 3],
            spatial=tuple(range(40, 40 + axes)), taps=taps, stride=tuple(range(1, axes + 1)),
            padding=tuple((a - 1, a + 1) for a in range(axes)), dtype=("float32", "bfloat16")[i % 2],
            layout=("contiguous", "channels_last", "mixed")[i % 3], bias=bool(i % 2),
            fp32_precision=("ieee", "matmul-high+conv-tf32")[i % 2], deterministic=bool(i % 3),
        )  # fmt: skip
        found = parse_key(problem.key())
        grid = taps.single_grid()
        assert found.window == taps.window
        assert found.taps == len(taps)
        assert found.dilation == (grid.dilation if grid else (1,) * axes)
        if len(taps) == 1:
            assert found.taps_class == "single"
        elif grid is None:
            assert found.taps_class == "irregular"
        else:
            assert found.taps_class == ("dense" if set(grid.dilation) == {1} else "dilated")
        assert found.groups_class == ("dense", "grouped", "depthwise")[i % 3]
        for name in ("batch", "c_in", "c_out", "groups", "spatial", "stride", "padding", "dtype", "layout", "bias",
                     "fp32_precision", "deterministic"):  # fmt: skip
            assert getattr(found, name) == getattr(problem, name), name
        assert (found.direction, found.device, found.device_kind) == (str(problem.direction), HERE.slug, "cpu")
        assert found.device_and_threads == ("cpu-testor-9000-avx2", 2)
        assert distance(found, found) == 0
        seen.add(found.taps_class)
    assert seen == {"single", "dense", "dilated", "irregular"}


@pytest.mark.parametrize(
    "change",
    [
        ("t3x3d2x2", "t"), ("t3x3d2x2", "t3x3d2"), ("t3x3d2x2", "t0x3"), ("t3x3d2x2", "t3x3d0x1"),
        ("t3x3d2x2", "t010/11"), ("t3x3d2x2", "t//"), ("t3x3d2x2", "t010///1"), ("t3x3d2x2", "t101"),
        ("i32x32", "i32"), ("i32x32", "i1x1x1x1"), ("s1x1", "s1x-1"), ("p2", "p2.5"), ("n2", "n-2"),
        ("n2", "n" + "9" * 5000), ("forward", "sideways"), (" bias", " maybe"), ("@", ""), ("g1 ", ""),
        ("forward", "forward\n"),
    ],
    ids=lambda change: ascii(change[1])[:14],
)  # fmt: skip
def test_what_is_not_a_key_is_refused(change: tuple[str, str]) -> None:
    key = a_problem(bias=True).key()
    parse_key(key)
    assert change[0] in key
    with pytest.raises(ValueError, match=r"key|mask|grid|taps"):
        parse_key(key.replace(*change, 1))


def test_a_hostile_key_costs_no_more_than_its_length() -> None:
    key = a_problem().key().replace("t3x3d2x2", f"t{10**17}x{10**17}d{10**17}x1")
    assert parse_key(key).taps == 10**34


def test_distance_orders_what_it_should() -> None:
    here = parse_key(a_problem().key())

    def to(**changes: Any) -> float:
        there = parse_key(a_problem(**changes).key())
        assert there.family == here.family
        assert distance(here, there) == distance(there, here) > 0
        return distance(here, there)

    assert to(batch=4) < to(batch=16) < to(batch=64)
    assert to(c_in=16) == pytest.approx(1)
    assert to(c_out=64) > to(c_out=32)
    assert to(spatial=(64, 64)) == pytest.approx(1)
    assert to(taps=TapPattern.grid((3, 3), 4)) < to(taps=TapPattern.grid((3, 3), 16))
    assert to(stride=(2, 2)) > to(spatial=(33, 33))
    assert 0 < to(padding=((2, 3), (2, 2))) < to(c_in=16)
    assert to(bias=True) < to(deterministic=True)
    assert to(device=replace(HERE, threads=8)) == OTHER_THREADS
    assert to(device=replace(HERE, name="Other")) == OTHER_DEVICE


def test_families_keep_apart_what_says_nothing_about_each_other() -> None:
    problems = [
        a_problem(),
        a_problem(direction=Direction.GRAD_INPUT),
        a_problem(dtype="bfloat16"),
        a_problem(layout="channels_last"),
        a_problem(groups=8),
        a_problem(groups=4),
        a_problem(taps=TapPattern.grid((1, 1))),
        a_problem(taps=TapPattern.grid((3, 3))),
        a_problem(taps=TapPattern.partial(3, 2, 2, axes=2)),
        a_problem(device=Device("cuda", "Testor", 0)),
        a_problem(spatial=(32,), taps=TapPattern.grid(3, 2), stride=(1,), padding=((2, 2),)),
    ]
    assert len({parse_key(problem.key()).family for problem in problems}) == len(problems)


# ---- records ---------------------------------------------------------------------------------


def test_a_record_survives_json_and_can_be_hashed() -> None:
    record = a_record()
    again = Record.from_json(json.loads(json.dumps(record.to_json())))
    assert again == record
    assert len({again, record}) == 1
    assert list(record.config) == sorted(record.config)
    assert {type(value) for value in again.config.values()} == {str, int, bool}


BAD_FIELDS: dict[str, list[object]] = {
    "schema": [0, 2, "1", None, True, 1.0],
    "key": ["", None, 3, "x" * 70_000, "a\nb", "\ud800"],
    "backend": ["", "os.system", "a b", "native;", None, 7, "n" * 65, "é"],
    "version": [-1, 1.5, True, "1", None, 10**20],
    "config": [
        None, [], "rows", {"k": None}, {"k": 1.5}, {"k": []}, {"k": {}}, {"k": "a,b=1"}, {"k": "}"}, {"k": ""},
        {"k": "x" * 129}, {"k": 10**30}, {"a b": 1}, {"": 1}, {"k": "\x00"}, {f"k{i}": i for i in range(65)},
    ],
    "toolchain": [None, [], {"torch": 2}, {"torch": ""}, {"a b": "1"}],
    "measured_on": [
        "", None, 20260131, "31.01.2026", "2026-13-01", "2026-01-31T25:00:00Z", "2026-01-31T12:00:00+01:00",
    ],
    "rivals": [None, {}, [1], [{"choice": "a"}], [{"choice": "", "p20_us": 1}], [{"choice": "a", "p20_us": -1}],
               [{"choice": "a", "p20_us": 1, "x": 1}], [{"choice": "a", "p20_us": 1}] * 65],
    **{
        name: [-1, float("nan"), float("inf"), "1", None, True, [], 10**400]
        for name in ("p20_us", "median_us", "p80_us", "native_us", "error", "native_error")
    },
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD_FIELDS.items() for v in values], ids=ascii)
def test_every_field_is_checked(name: str, value: object) -> None:
    obj = a_record().to_json()
    assert name in obj
    with pytest.raises(ValueError, match=name):
        Record.from_json({**obj, name: value})


def test_every_field_has_bad_values_here() -> None:
    assert BAD_FIELDS.keys() == {"schema", *(field.name for field in fields(Record))}


def test_fields_are_exactly_those_declared() -> None:
    obj = a_record().to_json()
    for name in obj:
        with pytest.raises(ValueError, match=name):
            Record.from_json({k: v for k, v in obj.items() if k != name})
    with pytest.raises(ValueError, match="code"):
        Record.from_json({**obj, "code": "import os"})
    for odd in (None, [], "record", 1, [obj]):
        with pytest.raises(ValueError, match="JSON object"):
            Record.from_json(odd)
    with pytest.raises(ForeignSchema):
        Record.from_json({**obj, "schema": 2})


def test_toolchain_counts_to_the_minor_version() -> None:
    now = toolchain(CPU)
    assert "torch" in now
    assert is_current(a_record(), CPU)
    base = torch.__version__.split("+")[0]
    major, minor, *_ = base.split(".")
    assert is_current(a_record(toolchain={**now, "torch": f"{major}.{minor}.99+cu999"}), CPU)
    assert not is_current(a_record(toolchain={**now, "torch": f"{major}.{int(minor) + 1}.0"}), CPU)
    assert not is_current(a_record(toolchain={**now, "torch": f"{major}.{minor}0.0"}), CPU)
    assert not is_current(a_record(toolchain={**now, "extra": "1.0"}), CPU)
    assert not is_current(a_record(toolchain={}), CPU)
    toolchain(torch.device("cuda"))  # no GPU is needed to ask


def test_utc_now_is_what_a_record_takes() -> None:
    assert a_record(measured_on=utc_now()).measured_on > "2025"


# ---- layers ----------------------------------------------------------------------------------


def test_layers_answer_in_order_and_say_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, shipped = a_problem(), tmp_path / "shipped"
    project = tmp_path / "work"
    (project / "deep" / "down").mkdir(parents=True)
    (project / "pyproject.toml").touch()
    monkeypatch.chdir(project / "deep" / "down")

    def answer() -> tuple[str, float] | None:
        hit = Store(tmp_path / "override", shipped=shipped).lookup(problem)
        return None if hit is None else (hit.layer, hit.record.p20_us)

    assert answer() is None
    write_packs([a_record(p20_us=4.0)], shipped)
    assert answer() == ("shipped", 4.0)
    Store(shipped=shipped).write(a_record(p20_us=3.0))
    assert answer() == ("user", 3.0)
    Store(project / ".adaptconv").write(a_record(p20_us=2.0))
    assert answer() == ("project", 2.0)
    Store(tmp_path / "override").write(a_record(p20_us=1.0))
    assert answer() == ("override", 1.0)
    found = list(Store(tmp_path / "override", shipped=shipped).records())
    assert [(hit.layer, hit.record.p20_us) for hit in found] == [
        ("override", 1.0), ("project", 2.0), ("user", 3.0), ("shipped", 4.0),
    ]  # fmt: skip
    nearest = Store(tmp_path / "override", shipped=shipped).neighbours(problem)
    assert [(apart, hit.layer) for apart, hit in nearest] == [(0.0, "override")]


def test_the_user_layer_is_private(tmp_path: Path) -> None:
    path = Store(shipped=tmp_path / "none").write(a_record())
    assert path.parent == tmp_path / "home" / ".cache" / "adaptconv" / "db"
    assert path.parent.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o600


def test_places_are_looked_up_at_first_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    early = Store(shipped=tmp_path / "none")
    monkeypatch.setenv("ADAPTCONV_DB", str(tmp_path / "env"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert early.target == tmp_path / "env"
    assert early.layers[2].root == tmp_path / "xdg" / "adaptconv" / "db"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert Store().layers[2].root == tmp_path / "home" / ".cache" / "adaptconv" / "db"


def test_the_packaged_layer_is_found() -> None:
    root = Store().layers[3].root
    assert root is not None
    assert (root / "README.md").exists()
    assert verify(root) == []


def test_epoch_and_digest_follow_what_would_be_answered(tmp_path: Path) -> None:
    use_database(tmp_path / "one")
    first, digest = epoch(), default_store().digest()
    assert default_store().lookup(a_problem()) is None
    assert (epoch(), default_store().digest()) == (first, digest)
    default_store().write(a_record())
    second, after = epoch(), default_store().digest()
    assert second > first
    assert after != digest
    assert Store(tmp_path / "one").digest() == after
    assert default_store().lookup(a_problem()) is not None
    use_database(tmp_path / "two")
    assert epoch() > second
    assert default_store().lookup(a_problem()) is None
    use_database(None)
    assert default_store().target == tmp_path / "home" / ".cache" / "adaptconv" / "db"


def test_a_stale_record_is_no_hit_but_a_neighbour(tmp_path: Path) -> None:
    here = a_store(tmp_path / "db")
    here.write(a_record(toolchain={"torch": "1.0.0"}))
    assert here.lookup(a_problem()) is None
    [(apart, hit)] = here.neighbours(a_problem())
    assert (apart, hit.current) == (STALE, False)
    shipped = tmp_path / "shipped"
    write_packs([a_record(p20_us=4.0)], shipped)
    both = a_store(tmp_path / "db", shipped)
    found = both.lookup(a_problem())
    assert found is not None
    assert found.layer == "shipped"
    [(apart, hit)] = both.neighbours(a_problem())
    assert (apart, hit.layer) == (0.0, "shipped")


def test_neighbours_are_near_first_and_follow_writes(tmp_path: Path) -> None:
    here, shipped = tmp_path / "db", tmp_path / "shipped"
    batches = [64, 2, 16, 4, 1024]
    write_packs([a_record(a_problem(batch=n)) for n in batches[:3]], shipped)
    db = a_store(here, shipped)
    for n in batches[3:]:
        db.write(a_record(a_problem(batch=n)))
        assert any(hit.record.key == a_problem(batch=n).key() for _, hit in db.neighbours(a_problem()))
    db.write(a_record(a_problem(batch=2, dtype="bfloat16")))
    ranked = db.neighbours(a_problem(batch=2))
    assert [parse_key(hit.record.key).batch for _, hit in ranked] == sorted(batches)
    assert [apart for apart, _ in ranked] == sorted(apart for apart, _ in ranked)
    assert ranked[0][0] == 0
    assert db.neighbours(a_problem(batch=2), limit=2) == ranked[:2]
    # Another process's writes are seen too.
    Store(here).write(a_record(a_problem(batch=3)))
    assert len(db.neighbours(a_problem(batch=2))) == len(ranked) + 1


def test_writes_within_one_tick_of_the_file_clock_are_seen(tmp_path: Path) -> None:
    root = tmp_path / "db"
    db = a_store(root)
    db.write(a_record())
    ahead = time.time_ns() + 10**9
    for n in (4, 8):
        os.utime(root, ns=(ahead, ahead))  # as if nothing had changed since the listing
        assert len(db.neighbours(a_problem())) == n // 4
        Store(root).write(a_record(a_problem(batch=n)))


def test_what_is_no_problem_is_not_stored(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="key of a problem"):
        a_store(tmp_path / "db").write(a_record(key="no problem"))
    assert not (tmp_path / "db").exists()


# ---- files that are not what they should be ---------------------------------------------------


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """An entry in the user layer, behind it a shipped record: what must answer when the entry cannot."""
    write_packs([a_record(p20_us=4.0)], tmp_path / "shipped")
    return Store(shipped=tmp_path / "shipped").write(a_record())


def refused(layered: Path, tmp_path: Path, match: str) -> None:
    """The next layer answers, after one warning that is not repeated, and writing repairs or says why not."""
    for i in range(3):
        db = Store(shipped=tmp_path / "shipped")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hit = db.lookup(a_problem())
            nearest = db.neighbours(a_problem())
            db.digest()
        assert hit is not None
        assert (hit.layer, hit.record.p20_us) == ("shipped", 4.0)
        assert [(apart, near.layer) for apart, near in nearest] == [(0.0, "shipped")]
        assert len(caught) == (1 if i == 0 else 0), [str(w.message) for w in caught]
        for warning in caught:
            assert issubclass(warning.category, DatabaseWarning)
            assert match in str(warning.message)
            assert str(layered.parent) in str(warning.message)


def _symlinked(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def _disowned(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        someone_else = os.geteuid() + 1
        monkeypatch.setattr(os, "geteuid", lambda: someone_else)


def _foreign(path: Path) -> None:
    obj = a_record().to_json()
    path.write_text(json.dumps({"record": {**obj, "schema": 2, "novelty": []}, "sha256": "0"}))


def _as_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path, 0o600)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda path: path.write_bytes(b""), "damaged"),
        (lambda path: path.write_bytes(b"\x80\x04pickle"), "damaged"),
        (lambda path: path.write_bytes(b"[" * 100_000), "damaged"),
        (lambda path: path.write_bytes(b" " * (files.MAX_ENTRY_BYTES + 1)), "too large"),
        (lambda path: path.write_bytes(files.encode_entry(a_record(a_problem(batch=9)))), "another problem"),
        (_foreign, "foreign schema"),
        (lambda path: path.write_text('{"schema": 7}'), "foreign schema"),
        (_symlinked, "symbolic link"),
        (lambda path: path.chmod(0o620), "writable by others"),
        (lambda path: path.chmod(0o602), "writable by others"),
        (_as_pipe, "not a file"),
        (lambda path: (path.unlink(), path.mkdir()), "not a file"),
    ],
    ids=["zero bytes", "not text", "nested", "too large", "misnamed", "foreign schema", "other file", "symlink",
         "group-writable", "world-writable", "pipe", "directory"],
)  # fmt: skip
def test_a_bad_file_is_refused_once(layered: Path, tmp_path: Path, spoil: Callable[[Path], Any], match: str) -> None:
    spoil(layered)
    refused(layered, tmp_path, match)
    if match != "not a file" or not layered.is_dir():
        db = Store(shipped=tmp_path / "shipped")
        db.write(a_record(p20_us=7.0))  # tuning again repairs it
        hit = db.lookup(a_problem())
        assert hit is not None
        assert hit.record.p20_us == 7.0


def test_a_foreign_owned_file_is_refused_once(layered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _disowned(layered, monkeypatch)
    refused(layered, tmp_path, "foreign owner")


@pytest.mark.parametrize("error", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE], ids=errno.errorcode.get)
def test_an_unreadable_file_is_refused_once(
    layered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    _fail(monkeypatch, "open", error, only=lambda path, *_: Path(path) == layered)
    refused(layered, tmp_path, "unreadable")


def _as_file(path: Path) -> None:
    for entry in path.iterdir():
        entry.unlink()
    path.rmdir()
    path.touch()


def _under_a_file(path: Path) -> None:
    path.parent.rename(path.parent.with_name("moved"))
    path.parent.touch()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda folder: folder.chmod(0o770), "writable by others"),
        (lambda folder: folder.chmod(0o707), "writable by others"),
        (_symlinked, "symbolic link"),
        (_as_file, "not a directory"),
        (_under_a_file, "unreadable"),
    ],
    ids=["group-writable", "world-writable", "symlink", "a file", "under a file"],
)  # fmt: skip
def test_a_bad_directory_is_refused_once(
    layered: Path, tmp_path: Path, spoil: Callable[[Path], Any], match: str
) -> None:
    spoil(layered.parent)
    refused(layered, tmp_path, match)
    with pytest.raises(DatabaseError, match=str(layered.parent)):
        Store(shipped=tmp_path / "shipped").write(a_record())


def test_a_foreign_owned_directory_is_refused_once(
    layered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _disowned(layered.parent, monkeypatch)
    refused(layered, tmp_path, "foreign owner")
    with pytest.raises(DatabaseError, match="foreign owner"):
        Store(shipped=tmp_path / "shipped").write(a_record())


def test_a_directory_that_cannot_be_listed_still_answers(layered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail(monkeypatch, "scandir", errno.EACCES)
    db = Store(shipped=layered.parent / "none")
    assert db.lookup(a_problem()) is not None
    with pytest.warns(DatabaseWarning, match="unreadable"):
        assert db.neighbours(a_problem()) == []


def test_truncation_at_every_offset(layered: Path, tmp_path: Path) -> None:
    whole = layered.read_bytes()
    warned = 0
    for length in range(len(whole)):
        layered.write_bytes(whole[:length])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            hit = Store(shipped=tmp_path / "shipped").lookup(a_problem())
        assert hit is not None
        assert hit.layer == "shipped", f"cut at {length} of {len(whole)} bytes, and believed"
        warned += len(caught)
    assert warned == 1
    layered.write_bytes(whole)
    hit = Store(shipped=tmp_path / "shipped").lookup(a_problem())
    assert hit is not None
    assert hit.layer == "user"


def _mutations(data: bytes, rng: random.Random, count: int) -> Iterator[bytes]:
    for i in range(count):
        mutant = bytearray(data)
        for _ in range(1 if i % 2 else rng.randint(1, 4)):
            place = rng.randrange(len(mutant))
            match i % 5:
                case 0 | 1:
                    mutant[place] ^= 1 << rng.randrange(8)
                case 2:
                    mutant[place : place + rng.randint(0, 4)] = rng.choice(
                        [b"null", b"1e999", b"NaN", b"-1", b'"', b"{", b"}", b"[]", b"\\ud800", b"true", b"0", b","]
                    )
                case 3:
                    del mutant[place : place + rng.randint(1, 30)]
                case _:
                    source = rng.randrange(len(data))
                    mutant[place:place] = data[source : source + rng.randint(1, 60)]
            if not mutant:
                break
        yield bytes(mutant)


def test_mutated_entries_are_refused_or_unchanged(layered: Path, tmp_path: Path) -> None:
    """Every single bit flip, and 3000 random mutations: no crash, and nothing believed that was not written."""
    whole, written = layered.read_bytes(), a_record()
    flips = (whole[:i] + bytes([whole[i] ^ 1 << bit]) + whole[i + 1 :] for i in range(len(whole)) for bit in range(8))
    warnings.simplefilter("ignore", DatabaseWarning)
    refusals = 0
    for mutant in itertools.chain(flips, _mutations(whole, random.Random(1), 3000)):
        try:
            record = files.decode_entry(mutant, layered.name)
        except files.Refused:
            refusals += 1
        else:
            assert record == written
    assert refusals >= 8 * len(whole)
    for mutant in _mutations(whole, random.Random(2), 100):  # the whole way through the layers
        layered.write_bytes(mutant)
        hit = Store(shipped=tmp_path / "shipped").lookup(a_problem())
        assert hit is not None
        assert hit.record in (written, a_record(p20_us=4.0))


def test_mutated_packs_yield_nothing_but_declared_types(tmp_path: Path) -> None:
    """Packs carry no checksum (people merge them), so what is left standing must still be well-formed."""
    records = [a_record(a_problem(batch=n)) for n in (1, 2, 3)]
    [path] = write_packs(records, tmp_path / "shipped")
    whole = path.read_bytes()
    warnings.simplefilter("ignore", DatabaseWarning)
    survivors = 0
    for mutant in _mutations(whole, random.Random(3), 2500):
        path.write_bytes(mutant)
        db = Store(tmp_path / "none", shipped=tmp_path / "shipped")
        db.neighbours(a_problem())
        for hit in db.records():
            record = hit.record
            survivors += 1
            assert record.backend.isidentifier() or record.backend.isalnum()
            assert all(type(value) in (str, int, bool) for value in record.config.values())
            assert all(type(version) is str for version in record.toolchain.values())
            assert all(type(t) is float and 0 <= t < float("inf") for t in (record.p20_us, record.native_us))
            assert Record.from_json(record.to_json()) == record
            parse_key(record.key)
    assert survivors > 500, "the mutations must leave something standing for this test to say anything"


def test_one_bad_row_of_a_pack_does_not_spoil_the_others(tmp_path: Path) -> None:
    [path] = write_packs([a_record(a_problem(batch=n)) for n in (1, 2, 3)], tmp_path / "shipped")
    obj = json.loads(path.read_text())
    obj["records"][1]["p20_us"] = "fast"
    path.write_text(json.dumps(obj))
    db = a_store(tmp_path / "db", tmp_path / "shipped")
    with pytest.warns(DatabaseWarning, match="p20_us"):
        assert db.lookup(a_problem(batch=2)) is None
    assert db.lookup(a_problem(batch=1)) is not None
    assert len(db.neighbours(a_problem())) == 2


# ---- places that cannot be written to ----------------------------------------------------------


def _fail(
    monkeypatch: pytest.MonkeyPatch, name: str, error: int, only: Callable[..., bool] = lambda *_: True, after: int = 0
) -> None:
    real, calls = getattr(os, name), itertools.count()

    def failing(*args: Any, **kwargs: Any) -> Any:
        if only(*args) and next(calls) >= after:
            raise OSError(error, os.strerror(error))
        return real(*args, **kwargs)

    monkeypatch.setattr(os, name, failing)


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("open", errno.EROFS), ("open", errno.ENOSPC), ("open", errno.EACCES), ("write", errno.ENOSPC),
        ("fsync", errno.ENOSPC), ("fsync", errno.EIO), ("close", errno.EDQUOT), ("replace", errno.EROFS),
    ],
    ids=str,
)  # fmt: skip
def test_a_failed_write_leaves_nothing_behind(tmp_path: Path, call: str, error: int) -> None:
    db = a_store(tmp_path / "db")
    path = db.write(a_record())
    before, at = path.read_bytes(), epoch()
    with pytest.MonkeyPatch.context() as patch:
        if call == "open":
            _fail(patch, call, error, only=lambda _path, flags, *_: bool(flags & os.O_CREAT))
        else:
            _fail(patch, call, error)
        with pytest.raises(DatabaseError, match=str(tmp_path / "db")) as failure:
            db.write(a_record(p20_us=1.0))
    assert failure.value.errno == error
    assert os.strerror(error) in str(failure.value)
    assert "ADAPTCONV_DB" in str(failure.value)
    assert only_json(tmp_path / "db") == [path.name]
    assert path.read_bytes() == before
    assert epoch() == at


def test_a_disk_that_fills_in_the_middle_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    db = a_store(tmp_path / "db")
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:100]))  # short writes are not failures
        db.write(a_record())
    assert db.lookup(a_problem()) is not None
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, data[:100]))
        _fail(patch, "write", errno.ENOSPC, after=2)
        with pytest.raises(DatabaseError):
            db.write(a_record(a_problem(batch=7)))
    assert len(only_json(tmp_path / "db")) == 1


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DatabaseError, match="ADAPTCONV_DB"):
        a_store(tmp_path / "file" / "db").write(a_record())
    assert (tmp_path / "file").read_bytes() == b""


def test_no_home_is_silent_until_something_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOME")
    write_packs([a_record()], tmp_path / "shipped")
    db = Store(shipped=tmp_path / "shipped")
    hit = db.lookup(a_problem())  # any warning would be an error here
    assert hit is not None
    assert hit.layer == "shipped"
    assert db.target is None
    with pytest.raises(DatabaseError, match="HOME"):
        db.write(a_record())


def test_a_deleted_working_directory_is_no_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert a_store(tmp_path / "db").lookup(a_problem()) is None
    os.chdir(tmp_path)


# ---- writers that die, and writers that compete --------------------------------------------------


def _fork(work: Callable[[], None]) -> int:
    """Run in a child that never returns to pytest."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork with threads: the child calls no torch
        child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return child


def test_killed_writers_lose_nothing_they_acknowledged(tmp_path: Path) -> None:
    """200 writers killed with SIGKILL at random moments: every file readable, no acknowledged record lost."""
    rng = random.Random(0)
    problems = [a_problem(batch=n) for n in range(1, 7)]
    record, root = a_record(), tmp_path / "db"
    acknowledged: dict[int, int] = {}
    counter = 0
    for _ in range(200):
        reader, writer = os.pipe()

        def work(first: int = counter, pipe: int = writer) -> None:
            db = a_store(root)
            for value in itertools.count(first):
                which = value % len(problems)
                db.write(replace(record, key=problems[which].key(), p20_us=float(value)))
                os.write(pipe, struct.pack("=q", value))

        child = _fork(work)
        os.close(writer)
        started = os.read(reader, 8) if rng.random() < 0.8 else b""
        time.sleep(rng.random() * 0.004)
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        with os.fdopen(reader, "rb") as rest:
            told = started + rest.read()
        for (value,) in struct.iter_unpack("=q", told):
            acknowledged[value % len(problems)] = counter = value
        counter += 2  # past the value that may have been written and not acknowledged
        if root.exists():
            assert verify(root) == []
        for which, value in acknowledged.items():
            hit = a_store(root).lookup(problems[which])
            assert hit is not None
            assert hit.record.p20_us >= value
    assert len(acknowledged) == len(problems)
    # What the dead left behind goes when a later writer finds it old enough.
    leftovers = [entry for entry in root.iterdir() if entry.name.endswith(".tmp")]
    fresh = root / ".fresh.tmp"
    fresh.touch()
    for entry in leftovers:
        os.utime(entry, (0, 0))
    a_store(root).write(record)
    assert [entry for entry in root.iterdir() if entry.name.endswith(".tmp")] == [fresh]


def test_sixteen_writers_lose_nothing(tmp_path: Path) -> None:
    root, record = tmp_path / "db", a_record()
    shared = a_problem(batch=999)

    def work(writer: int) -> None:
        db = a_store(root)
        for i in range(25):
            db.write(replace(record, key=a_problem(batch=100 * writer + i, c_in=3).key(), p20_us=float(i)))
            db.write(replace(record, key=shared.key(), p20_us=float(writer)))

    children = [_fork(lambda writer=writer: work(writer)) for writer in range(16)]  # type: ignore[misc]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 16
    assert verify(root) == []
    assert len(only_json(root)) == 16 * 25 + 1
    db = a_store(root)
    for writer, i in itertools.product(range(16), range(25)):
        hit = db.lookup(a_problem(batch=100 * writer + i, c_in=3))
        assert hit is not None
        assert hit.record.p20_us == i
    hit = db.lookup(shared)
    assert hit is not None
    assert hit.record.p20_us in range(16)


# ---- packs -------------------------------------------------------------------------------------


def test_merging_keeps_the_newer_whatever_the_order(tmp_path: Path) -> None:
    old = a_record(measured_on="2026-01-30", p20_us=1.0, backend="native")
    new = a_record(measured_on="2026-01-31", p20_us=2.0)
    same_day = a_record(measured_on="2026-01-31", p20_us=3.0)
    other = a_record(a_problem(batch=5))
    outcomes = {combine(order) for order in itertools.permutations([old, new, same_day, other, other])}
    assert len(outcomes) == 1
    [merged] = outcomes
    assert len(merged.records) == 2
    assert other in merged.records
    assert old not in merged.records
    assert len(merged.conflicts) == 2
    assert {conflict.dropped for conflict in merged.conflicts} | set(merged.records) == {old, new, same_day, other}
    assert "2026-01-30" in "".join(map(str, merged.conflicts))
    [a] = write_packs([old, other], tmp_path / "a")
    [b] = write_packs([new], tmp_path / "b")
    assert merge(a, b) == merge(b, a)
    assert merge(a, b).records == tuple(sorted([new, other], key=lambda record: record.key))
    assert merge(tmp_path / "a", tmp_path / "b") == merge(a, b)


def test_diff_says_what_differs(tmp_path: Path) -> None:
    one, two, three = (a_record(a_problem(batch=n)) for n in (1, 2, 3))
    changed = replace(two, p20_us=99.0)
    [a] = write_packs([one, two], tmp_path / "a")
    [b] = write_packs([changed, three], tmp_path / "b")
    found = diff(a, b)
    assert (found.only_a, found.only_b, found.changed) == ((one,), (three,), ((two, changed),))
    assert [line[0] for line in str(found).splitlines()] == ["-", "+", "~"]
    assert not diff(a, a)


def test_export_adds_to_what_is_there_and_is_then_found(tmp_path: Path) -> None:
    elsewhere = replace(HERE, threads=64)
    repo = tmp_path / "tuning_db"
    write_packs([a_record(measured_on="2025-01-01"), a_record(a_problem(batch=8))], repo)
    db = a_store(tmp_path / "db", shipped=repo)
    db.write(a_record(p20_us=1.0))
    db.write(a_record(a_problem(device=elsewhere)))
    written, conflicts = export_shipped(db, repo)
    assert [path.name for path in written] == [f"{HERE.slug}.json", f"{elsewhere.slug}.json"]
    assert [(c.kept.p20_us, c.dropped.measured_on) for c in conflicts] == [(1.0, "2025-01-01")]
    assert verify(repo) == []
    stranger = a_store(tmp_path / "empty", shipped=repo)
    for problem in (a_problem(), a_problem(batch=8), a_problem(device=elsewhere)):
        hit = stranger.lookup(problem)
        assert hit is not None
        assert hit.layer == "shipped"
    first = [path.read_bytes() for path in written]
    export_shipped(db, repo)
    assert [path.read_bytes() for path in written] == first, "exporting twice must change nothing"


def test_an_export_onto_a_broken_pack_writes_nothing(tmp_path: Path) -> None:
    db = a_store(tmp_path / "db")
    db.write(a_record())
    (tmp_path / "repo").mkdir()
    pack = tmp_path / "repo" / f"{HERE.slug}.json"
    pack.write_text("{")
    with pytest.raises(ValueError, match="damaged"):
        export_shipped(db, tmp_path / "repo")
    assert pack.read_text() == "{"


def test_verify_finds_every_kind_of_fault(tmp_path: Path) -> None:
    [path] = write_packs([a_record(a_problem(batch=n)) for n in (1, 2, 3)], tmp_path)
    obj = json.loads(path.read_text())
    assert verify(path) == [] == verify(tmp_path)

    def faults(**changes: Any) -> str:
        path.write_text(json.dumps({**obj, **changes}))
        return "\n".join(verify(tmp_path))

    rows = obj["records"]
    assert "out of order" in faults(records=rows[::-1])
    assert "repeated" in faults(records=[rows[0], rows[0]])
    assert "row 1" in faults(records=[rows[0], {**rows[1], "config": {"k": None}}])
    assert "row 0" in faults(records=["row"])
    assert "schema" in faults(schema=2)
    assert "pack of cpu-other" in faults(device="cpu-other")
    assert "named for another device" in faults(device="cpu-other", records=[])
    assert "key" in faults(records=[{**rows[0], "key": "no problem"}])
    assert "missing" in verify(tmp_path / "nowhere.json")[0]
    with pytest.raises(ValueError, match="missing"):
        merge(tmp_path / "nowhere.json")
