"""Replacing files and folders so that a reader, or a kill at any moment, finds the old or the new one, whole.

Everything temporary is a hidden sibling named ``.NAME.PID-RANDOM.tmp`` (or ``.old``), so that whoever comes
next can tell what was left behind by a process that died.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from compexport.errors import InputError, describe

if sys.platform != "win32":
    import fcntl

_NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.(?:tmp|old)", re.DOTALL)


def leftover_name(name: str) -> str | None:
    """The NAME a temporary sibling belongs to, None when ``name`` is not that of a temporary sibling."""
    match = _LEFTOVER.fullmatch(name)
    return match["name"] if match else None


def temporary(path: Path, suffix: str = "tmp") -> Path:
    """A fresh hidden sibling name of ``path``."""
    return path.with_name(f".{path.name}.{os.getpid()}-{os.urandom(4).hex()}.{suffix}")


def leftovers(path: Path) -> list[Path]:
    """Temporary siblings of ``path``, of live and dead processes alike; none when the parent cannot be read."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return []
    return [path.with_name(name) for name in sorted(names) if leftover_name(name) == path.name]


def remove(path: Path) -> None:
    """Remove a file, link or folder as far as possible; never follows a link, never raises."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except OSError:
        return


def is_no_space(error: BaseException) -> bool:
    """Whether an error says that the disk, the quota or the file size limit is exhausted."""
    return isinstance(error, OSError) and error.errno in _NO_SPACE


def write_error(path: Path, error: OSError) -> InputError:
    """The one-line error for a failed write of ``path``."""
    if is_no_space(error):
        return InputError(describe(f"no space left to write {path}", hint="free some space, nothing has been changed"))
    return InputError(describe(f"cannot write {path}", got=error.strerror or error, hint="nothing has been changed"))


def sync(path: Path) -> None:
    """Flush a file or folder to disk; silently does nothing where folders cannot be flushed."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.EROFS):
            raise
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes) -> None:
    """Replace one file; raises InputError with the old one untouched and nothing left behind."""
    staged = temporary(path)
    try:
        with open(staged, "xb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.replace(staged, path)
        sync(path.parent)
    except OSError as error:
        remove(staged)
        raise write_error(path, error) from error
    except BaseException:
        remove(staged)
        raise


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step (Linux ``renameat2``); False where kernel, libc or file system cannot."""
    if sys.platform != "linux":
        return False
    import ctypes

    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    status = rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    if status == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EXDEV):
        return False
    raise OSError(code, os.strerror(code), str(second))


def put_in_place(staged: Path, dest: Path) -> Path | None:
    """Make the folder ``staged`` appear as ``dest``; returns where the previous ``dest`` is now, None without one.

    Where the exchange is not available, ``dest`` is absent for the moment between two renames; a kill in that
    moment leaves the old one as ``.NAME.*.old``, which ``restore`` brings back.
    """
    if not os.path.lexists(dest):
        os.rename(staged, dest)
        return None
    if _exchange(staged, dest):
        return staged
    aside = temporary(dest, "old")
    os.rename(dest, aside)
    try:
        os.rename(staged, dest)
    except BaseException:
        os.rename(aside, dest)
        raise
    return aside


@contextmanager
def staged_folder(dest: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``dest`` when the block ends, the previous one being removed.

    After an error ``dest`` is what it was, and nothing is left beside it.
    """
    dest.parent.mkdir(parents=True, exist_ok=True)
    staged = temporary(dest)
    staged.mkdir()
    try:
        yield staged
        previous = put_in_place(staged, dest)
    except BaseException:
        remove(staged)
        raise
    if previous is not None:
        remove(previous)


def restore(dest: Path) -> None:
    """Undo a replacement that was killed between its two renames. Call it with the writer's lock held."""
    if os.path.lexists(dest):
        return
    aside = [path for path in leftovers(dest) if path.name.endswith(".old")]
    if aside:
        os.rename(max(aside, key=lambda path: path.stat().st_mtime_ns), dest)


@contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Wait for and hold the advisory lock of a folder; for moments only. A no-op where folders have no locks."""
    descriptor = _lock_folder(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock_folder(folder: Path) -> int | None:
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return None  # not there: nothing to protect
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


class WriterLock:
    """At most one writer per destination: an advisory lock on the file ``.NAME.lock`` beside it.

    The kernel drops the lock when its process dies, so a lock file left behind never blocks anyone.
    """

    def __init__(self, dest: Path) -> None:
        self._dest = dest
        self._path = dest.with_name(f".{dest.name}.lock")
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock; raises InputError when another writer holds it. Without lock support it takes nothing."""
        if sys.platform == "win32":
            return
        while self._descriptor is None:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                self._descriptor = self._lock(descriptor)
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def _lock(self, descriptor: int) -> int | None:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode("ascii", "replace").strip()
            raise InputError(
                describe(
                    f"another process{f' (pid {holder})' if holder.isdigit() else ''} is writing {self._dest}",
                    hint="wait until it is done, or choose another output",
                )
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP):
                raise
        # Its previous holder removes the file when done: a lock on a removed file protects nothing.
        try:
            current = os.path.samestat(os.fstat(descriptor), os.lstat(self._path))
        except FileNotFoundError:
            current = False
        if not current:
            return None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        return descriptor

    def release(self) -> None:
        """Give the lock back and remove its file."""
        if self._descriptor is None:
            return
        remove(self._path)
        os.close(self._descriptor)
        self._descriptor = None
