"""The kernel's library: compiled at first use, kept in a cache directory, loaded through ctypes.

Nothing here runs at import. A library's name holds the hash of what it was made from and the hash of its own
content: one that is truncated or altered is never loaded, and two processes may build at once.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

import torch

from adaptconv.problem import Device
from adaptconv.records.files import make_directory, remove_leftovers

_LOG = logging.getLogger("adaptconv.backends.cpp")
_SOURCE = Path(__file__).with_name("taps.cpp")  # which includes the others
_SOURCES = (_SOURCE, *(_SOURCE.with_name(f"{name}.h") for name in ("numbers", "tiles", "forward", "weight")))
_NAMES = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC")
_TUNED = (("-march=native",), ("-mcpu=native",), ())  # tried in this order: not every compiler knows the first
_TIMEOUT_S = 300.0
_LEFTOVER_S = 3600.0
_LOCK = threading.Lock()

NO_COMPILER = "no C++ compiler was found ($CXX, c++, g++, clang++)"


class BuildFailed(Exception):
    """The kernel cannot be had in this process; the message says why."""


_failure: str | None = None
_library: Library | None = None


class Library:
    """The loaded kernel.

    Attributes:
        path: the file it was loaded from.
        taps: ``adaptconv_taps`` of ``taps.cpp``; it returns 0, or 1 where memory ran out.
        parallel: address of the ``GOMP_parallel`` that torch's own kernels call, or None: then one thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.taps = ctypes.CDLL(str(path)).adaptconv_taps
        self.taps.restype = ctypes.c_int
        self.taps.argtypes = [ctypes.c_void_p] * 7
        self.parallel = torchs_parallel()


def rejection() -> str | None:
    """Why the kernel cannot run in this process, as far as can be told without building it."""
    if _failure is not None or _library is not None:
        return _failure
    return None if compiler() else NO_COMPILER


def library() -> Library:
    """The kernel, built now if it has to be.

    Raises:
        BuildFailed: there is no compiler, or it failed; the reason is remembered for the process.
    """
    global _failure, _library
    if _library is not None:
        return _library
    with _LOCK:
        if _failure is not None:
            raise BuildFailed(_failure)
        if _library is None:
            try:
                _library = _obtain()
            except (BuildFailed, OSError, AttributeError) as error:
                _failure = f"its kernel could not be built: {error}" if str(error) != NO_COMPILER else NO_COMPILER
                _LOG.warning("the C++ tap kernel is not available, other backends answer for it: %s", _failure)
                raise BuildFailed(_failure) from None
        return _library


@lru_cache(maxsize=1)
def compiler() -> tuple[str, ...] | None:
    """The command of the C++ compiler: ``$CXX`` if it is set, else the first of c++, g++ and clang++ on the path."""
    if os.name != "posix":
        return None
    named = os.environ.get("CXX", "").strip()
    candidates = [shlex.split(named)] if named else [[name] for name in _NAMES]
    for command in candidates:
        found = shutil.which(command[0])
        if found is not None:
            return (found, *command[1:])
    return None


def torchs_parallel() -> int | None:
    """Address of ``GOMP_parallel`` as torch's CPU library sees it, so that one pool of threads serves both.

    A symbol asked of a loaded library is looked for in it and in what it was linked with: whatever OpenMP runtime
    torch brought, under whatever name.
    """
    suffix = ".dylib" if platform.system() == "Darwin" else ".so"
    path = Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"
    try:
        torchs = ctypes.CDLL(str(path), mode=os.RTLD_NOLOAD | os.RTLD_NOW)
        return ctypes.cast(torchs.GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def cache_root() -> Path | None:
    """Where libraries are kept: ``$XDG_CACHE_HOME/adaptconv/cpp`` or ``~/.cache/adaptconv/cpp``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not cache.is_absolute():
        home = Path(os.environ.get("HOME", ""))
        if not home.is_absolute():
            return None
        cache = home / ".cache"
    return cache / "adaptconv" / "cpp"


def _obtain() -> Library:
    command = compiler()
    if command is None:
        raise BuildFailed(NO_COMPILER)
    key = _key(command)
    root = cache_root()
    if root is not None:
        found = _cached(root, key)
        if found is not None:
            return found
        try:
            make_directory(root)
            if _is_ours(root, stat.S_ISDIR):
                remove_leftovers(root, os.listdir(root), time.time() - _LEFTOVER_S)
                return Library(_build(command, root, key))
            _LOG.warning("%s belongs to or can be written by others; building in a temporary directory", root)
        except OSError as error:
            _LOG.warning("%s cannot be used (%s); building in a temporary directory", root, error.strerror or error)
    folder = Path(tempfile.mkdtemp(prefix="adaptconv-cpp-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Library(_build(command, folder, key))


def _key(command: tuple[str, ...]) -> str:
    """Hash of all that the compiled code depends on."""
    try:
        version = subprocess.run([*command, "--version"], capture_output=True, timeout=_TIMEOUT_S, check=False).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{command[0]}: {error}") from None
    processor = f"{platform.machine()} {Device.of(torch.device('cpu')).name}"
    sources = (source.read_bytes() for source in _SOURCES)
    parts = (*sources, repr((command, _FLAGS, _TUNED)).encode(), version, processor.encode())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _cached(root: Path, key: str) -> Library | None:
    """An intact library of this key, if there is one; damaged ones are deleted."""
    if not _is_ours(root, stat.S_ISDIR):
        return None
    for path in sorted(root.glob(f"{key}-*.so")):
        if not _is_ours(path, stat.S_ISREG):
            continue
        if path.name == _name(key, path.read_bytes()):
            with suppress(OSError, AttributeError):
                return Library(path)
        with suppress(OSError):
            path.unlink()
    return None


def _is_ours(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is of a kind, no link, and nobody else (but root) can have written it."""
    try:
        found = os.lstat(path)
    except OSError:
        return False
    return bool(kind(found.st_mode) and found.st_uid in (os.geteuid(), 0) and not found.st_mode & 0o022)


def _name(key: str, content: bytes) -> str:
    return f"{key}-{hashlib.sha256(content).hexdigest()[:24]}.so"


def _build(command: tuple[str, ...], folder: Path, key: str) -> Path:
    """Compile into a folder and put the library in place whole or not at all."""
    _LOG.info("building the C++ tap kernel, once, in %s", folder)
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=folder)
    os.close(descriptor)
    temporary = Path(name)
    try:
        complaint = ""
        for tuned in _TUNED:
            full = [*command, *_FLAGS, *tuned, "-x", "c++", str(_SOURCE), "-o", str(temporary)]
            try:
                done = subprocess.run(
                    full, capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False
                )
            except (OSError, subprocess.TimeoutExpired) as error:
                raise BuildFailed(f"{command[0]}: {error}") from None
            if done.returncode == 0:
                temporary.chmod(0o700)
                target = folder / _name(key, temporary.read_bytes())
                os.replace(temporary, target)
                return target
            complaint = complaint or _first_error(done.stderr, done.returncode)
        raise BuildFailed(complaint)
    finally:
        with suppress(OSError):
            temporary.unlink()


def _first_error(text: str, code: int) -> str:
    """The compiler's first line that speaks of an error, or its first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else f"the compiler returned {code}")
