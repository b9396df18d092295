"""Writing a bundle: everything is made in a staging folder beside the destination, then swapped in at once."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
from pathlib import Path
from types import TracebackType
from typing import Any

from compexport.errors import BundleError, CompexportError, InputError, describe
from engines import bundle_tables
from engines.atomic import (
    WriterLock,
    is_no_space,
    leftovers,
    locked_folder,
    put_in_place,
    remove,
    restore,
    sync,
    temporary,
    write_error,
    write_file,
)
from engines.bundle_manifest import MAX_BYTES as MAX_MANIFEST_BYTES
from engines.bundle_manifest import seal_of
from engines.bundle_paths import LAYOUT, MANIFEST, PROFILES, QUALITY, SEAL, is_measured, linked_outside, shown, walk
from engines.bundle_reader import Bundle, sha256_of
from engines.manifest import FileEntry, Manifest

_FULL_DISK_BYTES = 1 << 20


class BundleWriter:
    """Context manager that writes the bundle ``dest`` all at once or not at all.

    Put the files into ``dir`` and call ``commit`` last. Leaving without ``commit`` removes ``dir`` and leaves
    ``dest`` as it was. ``previous`` is the readable bundle at ``dest``, None without one.
    """

    dir: Path
    previous: Bundle | None

    def __init__(self, dest: str | os.PathLike[str], *, force_not_bundle: bool = False) -> None:
        """Raises InputError when ``dest`` exists and is no bundle, unless ``force_not_bundle``: then it is replaced.

        Nothing is written before the context is entered.
        """
        try:
            self._dest = Path(dest).resolve()
            self._force = force_not_bundle
            self._lock = WriterLock(self._dest)
            self._check_dest()
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(describe(f"cannot write to {shown(os.fspath(dest))}", got=shown(str(error)))) from None
        self._made_parents: list[Path] = []
        self.previous = None

    def __enter__(self) -> BundleWriter:
        """Lock ``dest``, sweep what dead writers left, make ``dir``; raises InputError when another writer is at it."""
        try:
            self._make_parents()
            self._lock.acquire()
            restore(self._dest)
            self._sweep()
            self._check_dest()
            self.previous = self._open_previous()
            self.dir = temporary(self._dest)
            self.dir.mkdir()
        except BaseException as error:
            self._clean()
            if isinstance(error, OSError):
                raise write_error(self._dest, error) from error
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the staging folder and give the lock back; a full disk becomes a one-line InputError."""
        no_space = error is not None and (is_no_space(error) or _looks_full(error, self.dir))
        self._clean()
        if no_space:
            raise InputError(
                describe(f"no space left to write {self._dest}", hint="free some space, nothing has been changed")
            ) from error

    def reusable(self, rel: str) -> bool:
        """Whether ``previous`` has this file, undamaged."""
        try:
            return self.previous is not None and self.previous.file(rel).is_file()
        except BundleError:
            return False

    def reuse(self, rel: str) -> Path:
        """Bring a file of ``previous`` into ``dir`` under the same path; raises BundleError when it is damaged.

        The two share their content on disk (hard link; a copy where links are impossible): never write into the
        returned file, replace it instead.
        """
        if self.previous is None:
            raise BundleError(describe(f"there is no earlier bundle at {self._dest} to take {shown(rel)} from"))
        source = self.previous.file(rel)
        target = self.dir / rel
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, target, follow_symlinks=False)
        except FileExistsError:
            raise
        except OSError:
            shutil.copy2(source, target)
        return target

    def commit(self, manifest: Manifest) -> Bundle:
        """Complete the manifest from the files in ``dir``, check all of it, swap it in; returns the new bundle.

        ``manifest.files`` is replaced. Measured tables of the previous bundle are kept for the variants whose graphs
        did not change. When this raises, ``dest`` is as it was.
        """
        try:
            staged = self._complete(manifest)
            with locked_folder(self._dest):
                self._carry_tables(staged.manifest)
                replaced = put_in_place(self.dir, self._dest)
        except OSError as error:
            raise write_error(self._dest, error) from error
        self._made_parents.clear()
        with contextlib.suppress(OSError):  # it is in place, whatever the disk says now
            sync(self._dest.parent)
        if replaced is not None:
            remove(replaced)
        return Bundle.open(self._dest)

    def _complete(self, manifest: Manifest) -> Bundle:
        """Write manifest and seal, flush all, and read it back as any reader would."""
        files = {rel: self._entry(rel, state) for rel, state in walk(self.dir) if not is_measured(rel)}
        complete = manifest.model_copy(update={"files": files})
        raw = (json.dumps(complete.model_dump(mode="json"), indent=1, ensure_ascii=False) + "\n").encode()
        if len(raw) > MAX_MANIFEST_BYTES:
            raise BundleError(describe("the manifest is too large", got=len(raw), expected=f"<= {MAX_MANIFEST_BYTES}"))
        write_file(self.dir / MANIFEST, raw)
        write_file(self.dir / SEAL, seal_of(raw))
        self._sync_all()
        staged = Bundle.open(self.dir)
        for rel in files:
            if rel.endswith(".onnx"):  # others have just been hashed
                staged.file(rel)
        return staged

    def _entry(self, rel: str, state: os.stat_result) -> FileEntry:
        """Size and hash of a staged file, which is made a file of its own if it has names elsewhere."""
        if rel.split("/")[0] not in LAYOUT or rel in (MANIFEST, SEAL):
            raise BundleError(describe("a file has no place in a bundle", got=shown(rel), expected=f"{sorted(LAYOUT)}"))
        if not stat.S_ISREG(state.st_mode):
            raise BundleError(describe("a bundle holds regular files only", got=shown(rel)))
        path = self.dir / rel
        if state.st_nlink > 1 and linked_outside(self.dir, path):
            own = temporary(path)
            shutil.copy2(path, own)
            os.replace(own, path)
        return FileEntry(size_bytes=path.stat().st_size, sha256=sha256_of(path))

    def _sync_all(self) -> None:
        folders = {self.dir}
        for rel, state in walk(self.dir):
            path = self.dir / rel
            folders |= {parent for parent in path.parents if parent.is_relative_to(self.dir)}
            if state.st_nlink == 1:  # a shared file is on disk since the previous build
                sync(path)
        for folder in folders:
            sync(folder)

    def _carry_tables(self, new: Manifest) -> None:
        if self.previous is None:
            return
        old = self.previous.manifest
        tables: dict[str, dict[str, Any] | None] = {}
        for device in self.previous.profiles():
            table = _readable(self.previous, device)
            tables[f"{PROFILES}/{device}.json"] = table and bundle_tables.carried_profile(table, old, new)
        table = _readable(self.previous, None)
        tables[QUALITY] = table and bundle_tables.carried_quality(table, old, new)
        for rel, table in tables.items():
            target = self.dir / rel
            if table and not target.exists():
                target.parent.mkdir(exist_ok=True)
                write_file(target, bundle_tables.encode(table))

    def _check_dest(self) -> None:
        if self._force or not os.path.lexists(self._dest) or _is_empty(self._dest):
            return
        if reason := _why_not_a_bundle(self._dest):
            raise InputError(
                describe(f"output {self._dest} exists and is not a bundle", got=reason, hint="choose another output")
            )

    def _make_parents(self) -> None:
        missing = [parent for parent in self._dest.parents if not parent.exists()]
        for parent in reversed(missing):
            parent.mkdir(exist_ok=True)
            self._made_parents.append(parent)

    def _sweep(self) -> None:
        """With the lock held nobody else writes here, so every temporary sibling belongs to a dead writer."""
        for path in leftovers(self._dest):
            remove(path)

    def _open_previous(self) -> Bundle | None:
        try:
            return Bundle.open(self._dest)
        except BundleError:
            return None

    def _clean(self) -> None:
        if hasattr(self, "dir"):
            remove(self.dir)
        self._lock.release()
        for parent in reversed(self._made_parents):
            try:
                parent.rmdir()
            except OSError:
                return


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _why_not_a_bundle(dest: Path) -> str:
    """Why replacing ``dest`` could destroy something else than a bundle; empty when it cannot.

    Decided by names alone, so that a damaged bundle can be rebuilt in place.
    """
    if not dest.is_dir():
        return "a file"
    names = sorted(name for name in os.listdir(dest) if not name.startswith("."))
    if MANIFEST not in names:
        return f"no {MANIFEST}"
    strange = [name for name in names if name not in LAYOUT]
    if strange:
        return f"{shown(strange[0])}, which is no part of a bundle"
    return "" if SEAL in names or "graphs" in names else f"no graphs beside {MANIFEST}"


def _looks_full(error: BaseException, folder: Path) -> bool:
    """Libraries that write files often hide the system's error; then the free space tells."""
    if isinstance(error, CompexportError) or not isinstance(error, Exception):
        return False
    try:
        return shutil.disk_usage(folder).free < _FULL_DISK_BYTES
    except OSError:
        return False


def _readable(bundle: Bundle, device: str | None) -> dict[str, Any] | None:
    """A measured table, None when it is missing or damaged: a damaged one is not worth carrying over."""
    try:
        return bundle.quality() if device is None else bundle.profile(device)
    except BundleError:
        return None
