"""Real English text that any machine has: the docstrings of the installed Python packages and the standard library.

Sources are parsed, never imported. The same installation and seed give the same texts in the same order.
"""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from compexport.errors import CompexportError, describe

DEFAULT_LIMIT = 8000
HELD_OUT_EVERY = 10  # one text in ten is held out
SHORTEST, LONGEST = 40, 400  # characters of one text
FEWEST_WORDS = 7
PLAIN_SHARE = 0.8  # of a text's words; the rest may be names, numbers and code

_SENTENCES = re.compile(r"[A-Z][a-z]*[ ,'].*[.!?]", re.DOTALL)
_PLAIN_WORD = re.compile(r"\(?[A-Za-z][a-z'’-]*[),.;:!?]*")
_LETTERS = re.compile(r"[A-Za-z]{2,}")
_PARAGRAPH = re.compile(r"\n\s*\n")
_MARKUP = (">>>", "::", ":param", "|", "{", "<", "`)", "@", "==", "\\", "---", ": -", "~~~", "***")


def docstrings(limit: int = DEFAULT_LIMIT, seed: int = 0) -> tuple[list[str], list[str]]:
    """About ``limit`` paragraphs of English prose, split into (training, held-out) 9 to 1.

    The split and the removal of copies go by each text's first words, so that near-copies (a docstring repeated with
    another class's name at its end) fall on one side. ``seed`` chooses which files are read first, hence which texts.
    Raises CompexportError where there is hardly any text, for example when sources were stripped.
    """
    found: dict[str, str] = {}
    for path in _source_files(seed):
        for text in _texts(path):
            found.setdefault(_opening(text), text)
        if len(found) >= limit:
            break
    kept = list(found.items())[:limit]
    held_out = [text for opening, text in kept if _hash(opening) % HELD_OUT_EVERY == 0]
    training = [text for opening, text in kept if _hash(opening) % HELD_OUT_EVERY]
    if not training or not held_out:
        raise CompexportError(
            describe("no docstrings found in the installed packages", got=len(kept), hint="give your own texts")
        )
    return training, held_out


def prose(docstring: str) -> Iterator[str]:
    """The paragraphs of a docstring that are whole English sentences, without markup, examples or field lists."""
    for paragraph in _PARAGRAPH.split(docstring):
        if len(paragraph) < SHORTEST or any(mark in paragraph for mark in _MARKUP):
            continue
        text = " ".join(paragraph.replace("`", "").split())
        if SHORTEST <= len(text) <= LONGEST and _SENTENCES.fullmatch(text) and _mostly_words(text):
            yield text


def _mostly_words(text: str) -> bool:
    words = text.split()
    plain = sum(_PLAIN_WORD.fullmatch(word) is not None for word in words)
    return len(words) >= FEWEST_WORDS and plain >= PLAIN_SHARE * len(words)


def _source_files(seed: int) -> list[Path]:
    """Every package's modules, mixed by a hash of their names so that any first part is as varied as the whole."""
    roots = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    ordered = []
    for root in roots:
        for path in root.rglob("*.py"):
            name = path.relative_to(root).as_posix()
            parts = set(name.split("/"))
            # Tests hold few sentences; site-packages lies inside the standard library's folder on some systems.
            if not parts & {"site-packages", "dist-packages", "test", "tests"}:
                ordered.append((_hash(f"{seed}:{name}"), name, path))
    return [path for _, _, path in sorted(ordered)]


def _texts(path: Path) -> Iterator[str]:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    if '"""' not in source and "'''" not in source:
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return
    for node in _documented(tree):
        if docstring := ast.get_docstring(node):
            yield from prose(docstring)


def _documented(
    scope: ast.Module | ast.ClassDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    """A module, its classes and their functions; what is nested deeper is rarely documented and slow to search."""
    yield scope
    for node in scope.body:
        if isinstance(node, ast.ClassDef):
            yield from _documented(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _opening(text: str) -> str:
    return " ".join(word.lower() for word in _LETTERS.findall(text)[:8])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4], "big")
