"""Which paths a bundle may name: relative, inside, real files with no name outside. ``docs/bundle.md``, "Paths"."""

from __future__ import annotations

import os
import re
import stat
import time
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from engines.atomic import leftover_name, leftovers

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"
QUALITY = "quality.json"
PROFILES = "profiles"
# Top-level names of a bundle. A folder with any other name in it is never replaced: it holds something of the user's.
LAYOUT = frozenset({MANIFEST, SEAL, QUALITY, PROFILES, "tokenizer.json", "graphs", "engines"})

_MAX_PATH_BYTES = 1024
_MAX_PART_BYTES = 240
_WINDOWS_DEVICE = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)
_DEVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class FileFault(Exception):
    """What is wrong with one file of a bundle; becomes a BundleError or a Problem."""

    def __init__(self, file: str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = file
        self.problem = problem


def shown(name: str) -> str:
    """A name from a manifest as it can be printed on one line, whatever it holds."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 120 else f"{text[:117]}..."


def unsafe_reason(rel: str) -> str:
    """Why a path must not be in a manifest; empty when it may be."""
    try:
        size = len(rel.encode())
    except UnicodeEncodeError:
        return "it is not valid Unicode"
    if size > _MAX_PATH_BYTES:
        return f"it is longer than {_MAX_PATH_BYTES} bytes"
    if rel.startswith("/"):
        return "it is absolute"
    if "\\" in rel or ":" in rel:
        return "it has a backslash or a colon"
    return next((reason for part in rel.split("/") if (reason := _unsafe_part(part))), "")


def _unsafe_part(part: str) -> str:
    if part == "..":
        return "it leaves the bundle"
    if part in ("", "."):
        return "it has an empty part"
    if not part.isprintable():
        return "it has unprintable characters"
    if part != part.rstrip(". ") or _WINDOWS_DEVICE.fullmatch(part):
        return "it is not a file name everywhere"
    return f"a part is longer than {_MAX_PART_BYTES} bytes" if len(part.encode()) > _MAX_PART_BYTES else ""


def is_measured(rel: str) -> bool:
    """Whether a path is that of a table measured after the build, which the manifest does not list."""
    return rel == QUALITY or rel.startswith(f"{PROFILES}/")


def is_device_name(device: str) -> bool:
    """Whether a device can name a profile: letters, digits and ``._+-``, at most 100 characters."""
    return bool(_DEVICE.fullmatch(device)) and not _unsafe_part(f"{device}.json")


def check_listed(paths: Iterable[str]) -> None:
    """Refuse a list of files with an unsafe, reserved or doubly listed path; raises FileFault."""
    seen: dict[str, str] = {}
    for rel in paths:
        if reason := unsafe_reason(rel):
            raise FileFault(MANIFEST, f"names the file {shown(rel)}, which is not allowed: {reason}")
        if rel in (MANIFEST, SEAL) or is_measured(rel):
            raise FileFault(MANIFEST, f"lists {shown(rel)}, which no manifest may list")
        folded = unicodedata.normalize("NFC", rel).casefold()
        if folded in seen:
            raise FileFault(MANIFEST, f"lists {shown(rel)} twice, also as {shown(seen[folded])}")
        seen[folded] = rel
    for folded, rel in seen.items():
        parts = folded.split("/")
        if any("/".join(parts[:end]) in seen for end in range(1, len(parts))):
            raise FileFault(MANIFEST, f"lists {shown(rel)} below another file")


def regular_file(root: Path, rel: str) -> os.stat_result:
    """The state of a file of the bundle; raises FileFault when it is missing, linked or not a regular file."""
    here = os.fspath(root)
    parts = rel.split("/")
    for depth, part in enumerate(parts):
        here = os.path.join(here, part)
        try:
            state = os.lstat(here)
        except (FileNotFoundError, NotADirectoryError):
            raise FileFault(rel, "is missing") from None
        except OSError as error:
            raise FileFault(rel, f"cannot be read: {error.strerror}") from None
        if stat.S_ISLNK(state.st_mode):
            raise FileFault(rel, "is a symbolic link or below one, which a bundle must not have")
        if depth < len(parts) - 1 and not stat.S_ISDIR(state.st_mode):
            raise FileFault(rel, "is missing")
    if not stat.S_ISREG(state.st_mode):
        raise FileFault(rel, "is not a regular file")
    if state.st_nlink > 1 and linked_outside(root, Path(here)):
        raise FileFault(rel, "is a hard link to a file outside the bundle (`cp -r` of the bundle makes real files)")
    return state


def linked_outside(root: Path, path: Path) -> bool:
    """Whether a file has names outside its bundle and the bundle's own temporary siblings.

    A rebuild shares unchanged files with the bundle it replaces, by hard links, until the old one is removed.
    So a second name is fine when it is found in there. Names come and go while a writer works: look again
    before refusing.
    """
    for attempt in range(5):
        time.sleep(0.002 * attempt)
        try:
            state = os.lstat(path)
        except OSError:
            return False  # gone: the caller's next step says so
        if state.st_nlink <= 1 or _count_names(_family(root), state) >= state.st_nlink:
            return False
    return True


def _family(root: Path) -> list[Path]:
    """The bundle and its temporary siblings, whichever of them ``root`` is."""
    dest = root.with_name(leftover_name(root.name) or root.name)
    return [dest, *leftovers(dest)]


def _count_names(folders: list[Path], wanted: os.stat_result) -> int:
    return sum(
        (state.st_ino, state.st_dev) == (wanted.st_ino, wanted.st_dev)
        for folder in folders
        for _, state in walk(folder)
    )


def walk(root: Path) -> Iterator[tuple[str, os.stat_result]]:
    """Every entry below ``root`` that is not a folder, as (path, state), sorted; links are not followed."""
    pending = [""]
    while pending:
        prefix = pending.pop()
        try:
            names = sorted(os.listdir(root / prefix))
        except OSError:
            continue
        for name in names:
            rel = f"{prefix}{name}"
            try:
                state = os.lstat(root / rel)
            except OSError:
                continue
            if stat.S_ISDIR(state.st_mode):
                pending.append(f"{rel}/")
            else:
                yield rel, state
