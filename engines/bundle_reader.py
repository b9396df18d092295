"""Reading a bundle: nothing in it is believed before it is checked, and nothing in it is executed."""

from __future__ import annotations

import errno
import hashlib
import os
import posixpath
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from compexport.errors import BundleError, InputError, describe
from engines import bundle_tables
from engines.atomic import leftover_name, leftovers, locked_folder, remove, write_error, write_file
from engines.bundle_manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from engines.bundle_manifest import parse_manifest, seal_of
from engines.bundle_paths import (
    MANIFEST,
    PROFILES,
    QUALITY,
    SEAL,
    FileFault,
    is_device_name,
    is_measured,
    regular_file,
    shown,
    walk,
)
from engines.manifest import Manifest
from engines.onnx_links import locations

_SMALL_BYTES = 1 << 20  # files up to this size are hashed when a bundle is opened
_OPEN_TRIES = 100
_Identity = tuple[int, int, int, int]
_hashes: dict[_Identity, str] = {}  # sha256 of files this process has read, by what tells that they are unchanged


@dataclass(frozen=True)
class Problem:
    """One thing ``verify`` found: the path inside the bundle and what is wrong with it."""

    file: str
    problem: str


def identity(state: os.stat_result) -> _Identity:
    """Device, inode, size and modification time: what a file keeps as long as nobody writes to it."""
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


def _read(root: Path, rel: str, limit: int) -> tuple[bytes, _Identity]:
    """A small file of a bundle in memory; raises FileFault when it is missing, linked, special or too large."""
    regular_file(root, rel)
    try:
        with _opened(root / rel) as (descriptor, state), open(descriptor, "rb", closefd=False) as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        raise FileFault(rel, "is missing") from None
    except OSError as error:
        raise FileFault(rel, f"cannot be read: {error.strerror}") from None
    if len(data) > limit:
        raise FileFault(rel, f"is larger than {limit} bytes")
    return data, identity(state)


def sha256_of(path: Path, *, fresh: bool = False) -> str:
    """The content hash of a regular file; read once per process while the file is unchanged, unless ``fresh``."""
    with _opened(path) as (descriptor, state):
        key = identity(state)
        if not fresh and key in _hashes:
            return _hashes[key]
        # A file written to within one tick of the clock would look unchanged: only settled ones are remembered.
        tick_s = 2.0 if state.st_mtime_ns % 1_000_000_000 == 0 else 0.1
        settled = time.time() - state.st_mtime_ns / 1e9 > tick_s
        digest = _digest(descriptor)
        if settled and identity(os.fstat(descriptor)) == key:
            _hashes[key] = digest
        return digest


def _digest(descriptor: int) -> str:
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(1 << 20))
    with open(descriptor, "rb", buffering=0, closefd=False) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


@contextmanager
def _opened(path: Path) -> Iterator[tuple[int, os.stat_result]]:
    """Open for reading without following a link and without waiting on a pipe or device."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", os.fspath(path))
        yield descriptor, state
    finally:
        os.close(descriptor)


class Bundle:
    """A bundle opened for reading. ``path`` is absolute, ``manifest`` is checked. Safe to share between threads."""

    path: Path
    manifest: Manifest

    def __init__(self, path: Path, manifest: Manifest, opened: _Identity) -> None:
        self.path = path
        self.manifest = manifest
        self._opened = opened

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open and check a bundle; raises BundleError, one line, when it is missing, damaged, unsafe or newer.

        Checked: format version, manifest, every listed file's path and size, content of files up to 1 MiB.
        The content of larger files is checked by ``file``. A bundle that is being replaced opens as the old or the
        new one.
        """
        root = _resolved(path)
        for last in range(_OPEN_TRIES - 1, -1, -1):
            before = _manifest_identity(root)
            try:
                bundle = cls._open_once(root)
            except (FileFault, BundleError) as fault:
                if last == 0 or (before is not None and before == _manifest_identity(root)) or not _replacing(root):
                    raise (_error(root, fault) if isinstance(fault, FileFault) else fault) from None
                time.sleep(0.001)
                continue
            if bundle._opened == _manifest_identity(root):
                return bundle
        raise BundleError(describe(f"bundle {root} is being replaced all the time", hint="try again later"))

    @classmethod
    def _open_once(cls, root: Path) -> Bundle:
        raw, opened = _read_manifest(root)
        bundle = cls(root, parse_manifest(raw), opened)
        for rel, entry in bundle.manifest.files.items():
            bundle._check_size(rel)
            if entry.size_bytes <= _SMALL_BYTES:
                bundle._check_hash(rel)
        _check_seal(root, raw)
        return bundle

    def file(self, rel: str, *, check: bool = True) -> Path:
        """Absolute path of a listed file, safe to open; raises BundleError.

        With ``check`` its content is compared with the manifest, once per process, and an ONNX file's external
        data must lie inside the bundle.
        """
        if rel not in self.manifest.files:
            raise BundleError(describe(f"bundle {self.path} has no file {shown(rel)} in its manifest"))
        try:
            if check:
                self._check_file(rel)
            else:
                self._check_size(rel)
        except FileFault as fault:
            self._require_current()
            raise _error(self.path, fault) from None
        return self.path / rel

    def verify(self) -> list[Problem]:
        """Read everything anew and report all that is wrong; an empty list means that all is well. Never raises."""
        problems = [*self._manifest_problems()]
        for rel in self.manifest.files:
            problems += _problems(rel, partial(self._check_file, rel, fresh=True))
        for rel, _ in walk(self.path):
            if rel in self.manifest.files or rel in (MANIFEST, SEAL):
                continue
            if is_measured(rel) and rel.endswith(".json"):
                problems += _problems(rel, partial(self._table, rel))
            elif leftover_name(posixpath.basename(rel)) is None:
                problems.append(Problem(rel, "is not listed in the manifest"))
        return problems

    def profiles(self) -> list[str]:
        """Names of the devices this bundle has been measured on, sorted."""
        try:
            names = os.listdir(self.path / PROFILES)
        except OSError:
            return []
        devices = [name.removesuffix(".json") for name in names if name.endswith(".json")]
        return sorted(device for device in devices if is_device_name(device))

    def profile(self, device: str) -> dict[str, Any] | None:
        """The latency table of a device, None when it has not been measured; raises BundleError when damaged."""
        return self._load(_profile_path(device))

    def save_profile(self, device: str, table: dict[str, Any]) -> None:
        """Replace the latency table of a device in one step; raises InputError, the old one then stays."""
        self._save(_profile_path(device), table)

    def quality(self) -> dict[str, Any] | None:
        """The quality table, None when it has not been measured; raises BundleError when damaged."""
        return self._load(QUALITY)

    def save_quality(self, table: dict[str, Any]) -> None:
        """Replace the quality table in one step; raises InputError, the old one then stays."""
        self._save(QUALITY, table)

    def _check_size(self, rel: str) -> None:
        expected = self.manifest.files[rel].size_bytes
        size = regular_file(self.path, rel).st_size
        if size != expected:
            raise FileFault(rel, describe("has the wrong size", got=f"{size} bytes", expected=f"{expected} bytes"))

    def _check_file(self, rel: str, *, fresh: bool = False) -> None:
        self._check_size(rel)
        self._check_hash(rel, fresh=fresh)
        if rel.endswith(".onnx") or any(rel == graph.path for graph in self.manifest.graphs.values()):
            self._check_onnx(rel)

    def _check_hash(self, rel: str, *, fresh: bool = False) -> None:
        try:
            digest = sha256_of(self.path / rel, fresh=fresh)
        except FileNotFoundError:
            raise FileFault(rel, "is missing") from None
        except OSError as error:
            raise FileFault(rel, f"cannot be read: {error.strerror}") from None
        if digest != self.manifest.files[rel].sha256:
            raise FileFault(rel, "is damaged: its content differs from what the manifest's sha256 says")

    def _check_onnx(self, rel: str) -> None:
        """Every file an ONNX file refers to must be a listed file of this bundle."""
        try:
            wanted = locations(self.path / rel)
        except (OSError, ValueError) as error:
            raise FileFault(rel, f"is not a readable ONNX file: {error}") from None
        for location in sorted(wanted):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(rel), location))
            if location.startswith("/") or target not in self.manifest.files:
                raise FileFault(rel, f"wants to read {shown(location)}, which is not a file of the bundle")

    def _manifest_problems(self) -> list[Problem]:
        def check() -> None:
            raw, _ = _read_manifest(self.path)
            if parse_manifest(raw) != self.manifest:
                raise FileFault(MANIFEST, "is not the one this bundle was opened with: it was replaced")
            _check_seal(self.path, raw)

        return _problems(MANIFEST, check)

    def _load(self, rel: str) -> dict[str, Any] | None:
        try:
            return self._table(rel)
        except FileFault as fault:
            raise _error(self.path, fault, hint="delete it and measure again") from None

    def _table(self, rel: str) -> dict[str, Any] | None:
        if not os.path.lexists(self.path / rel):
            return None
        data, _ = _read(self.path, rel, bundle_tables.MAX_BYTES)
        try:
            return bundle_tables.decode(data)
        except ValueError as error:
            raise FileFault(rel, str(error)) from None

    def _save(self, rel: str, table: dict[str, Any]) -> None:
        try:
            data = bundle_tables.encode(table)
        except (TypeError, ValueError, RecursionError) as error:
            raise InputError(describe(f"cannot write {rel}", got=shown(str(error)), expected="plain JSON")) from None
        target = self.path / rel
        # The lock keeps a build from replacing the bundle between the check and the write, which would lose the table.
        with locked_folder(self.path):
            self._require_current()
            try:
                target.parent.mkdir(exist_ok=True)
                parent = os.lstat(target.parent)
            except OSError as error:
                raise write_error(target, error) from error
            if not stat.S_ISDIR(parent.st_mode):
                raise BundleError(describe(f"bundle {self.path}: {PROFILES} is a link", hint="remove it"))
            for stale in leftovers(target):
                remove(stale)
            write_file(target, data)

    def _require_current(self) -> None:
        if _manifest_identity(self.path) != self._opened:
            raise BundleError(
                describe(f"bundle {self.path} was replaced or removed while it was open", hint="open it again")
            )


def _resolved(path: str | os.PathLike[str]) -> Path:
    """The real folder of a bundle; a link to a bundle is fine, links inside are not."""
    try:
        return Path(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise BundleError(describe(f"no bundle at {shown(os.fspath(path))}", got=shown(str(error)))) from None


def _manifest_identity(root: Path) -> _Identity | None:
    """What tells one written bundle from the next: every build writes a new manifest file."""
    try:
        return identity(os.lstat(root / MANIFEST))
    except (OSError, ValueError):
        return None


def _replacing(root: Path) -> bool:
    """Whether a fault may come from looking while a writer replaces the bundle."""
    return bool(leftovers(root)) or os.path.lexists(root / MANIFEST)


def _read_manifest(root: Path) -> tuple[bytes, _Identity]:
    _require_folder(root)
    if not os.path.lexists(root / MANIFEST):
        if (root / "config.json").is_file():
            hint = f"`compexport build {root}` makes one"
            raise BundleError(describe(f"no bundle at {root}", got="a model", expected="a bundle", hint=hint))
        raise FileFault(MANIFEST, "is missing: this folder is not a bundle")
    return _read(root, MANIFEST, MAX_MANIFEST_BYTES)


def _require_folder(root: Path) -> None:
    try:
        mode = os.stat(root).st_mode
    except OSError as error:
        aside = [path for path in leftovers(root) if path.name.endswith(".old")]
        if aside:
            raise BundleError(
                describe(f"bundle {root} is missing: a build was interrupted", hint=f"rename {aside[-1]} to it")
            ) from None
        raise BundleError(describe(f"no bundle at {root}", got=error.strerror)) from None
    except ValueError as error:
        raise BundleError(describe(f"no bundle at {shown(str(root))}", got=str(error))) from None
    if not stat.S_ISDIR(mode):
        raise BundleError(describe(f"no bundle at {root}", got="a file", expected="a folder with manifest.json"))


def _check_seal(root: Path, raw: bytes) -> None:
    """The manifest's own hash lies beside it; compared last, so that a more telling error comes first."""
    seal, _ = _read(root, SEAL, 1024)
    if seal != seal_of(raw):
        raise FileFault(MANIFEST, f"is damaged or was edited: its content differs from what {SEAL} says")


def _problems(rel: str, check: Callable[[], object]) -> list[Problem]:
    try:
        check()
    except FileFault as fault:
        return [Problem(fault.file, fault.problem)]
    except (OSError, BundleError) as error:
        return [Problem(rel, str(error))]
    return []


def _profile_path(device: str) -> str:
    if not is_device_name(device):
        raise InputError(
            describe("bad device name for a profile", got=ascii(device)[:120], expected="letters, digits and ._+-")
        )
    return f"{PROFILES}/{device}.json"


def _error(root: Path, fault: FileFault, hint: str = "") -> BundleError:
    advice = hint or "build the bundle again; `compexport verify` lists everything that is wrong"
    if "upgrade compexport" in fault.problem or "not a bundle" in fault.problem:
        advice = ""
    return BundleError(describe(f"bundle {root}: {shown(fault.file)} {fault.problem}", hint=advice))
