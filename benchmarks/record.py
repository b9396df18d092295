"""What every benchmark's command line and record have in common."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("benchmarks/results")


def command_line(doc: str | None, result: str, *, work: bool = False) -> argparse.ArgumentParser:
    """A parser with ``--out`` and, where models are made, ``--work``; the module's ``doc`` is its help."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    if work:
        shared = Path(tempfile.gettempdir()) / "compexport-latency"
        parser.add_argument("--work", type=Path, default=shared, help="models and bundles, kept for the next run")
    parser.add_argument("--out", type=Path, default=RESULTS / f"{result}.json")
    return parser


def among(known: Collection[str]) -> Callable[[str], list[str]]:
    """A type of command-line arguments: names with commas, all of them ``known``."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if not set(found) <= set(known):
            raise argparse.ArgumentTypeError(f"got {text}, expected some of {', '.join(known)}")
        return found

    return names


def judged(problems: Sequence[str]) -> int:
    """The exit code of a benchmark that missed these targets, 3 for any, after saying so on stderr."""
    print("\n".join(problems) or "all targets met", file=sys.stderr)
    return 3 if problems else 0


def save(path: Path, result: dict[str, Any]) -> None:
    """Write the record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def once(record: Path, made_from: dict[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What ``work`` returns, or what it returned in an earlier run that was given the same (JSON values)."""
    wanted = json.loads(json.dumps(made_from))
    if record.exists():
        kept: dict[str, Any] = json.loads(record.read_text(encoding="utf-8"))
        if kept["made_from"] != wanted:
            raise SystemExit(f"{record}: made from something else; remove it with what it stands for, and run again")
        return dict(kept["document"])
    document = work()
    save(record, {"made_from": wanted, "document": document})
    return document


def without_paths(document: dict[str, Any], work: Path | None = None) -> dict[str, Any]:
    """A command's document without where it wrote; files in ``work`` are named as from there, wherever they stand."""
    kept = {key: value for key, value in document.items() if key not in {"output", "bundle"}}
    if work is None:
        return kept
    beginning = re.compile(rf"(?<!\S){re.escape(str(work))}/")  # of a word, not a part of another path

    def shortened(value: Any) -> Any:
        if isinstance(value, str):
            return beginning.sub("", value)
        if isinstance(value, dict):
            return {name: shortened(one) for name, one in value.items()}
        return [shortened(one) for one in value] if isinstance(value, list) else value

    return {name: shortened(value) for name, value in kept.items()}


def say(message: str, done: float | None = None, total: float | None = None) -> None:
    """The beginning and end of every piece of work, on stderr."""
    if not done or done == total:
        print(message, file=sys.stderr, flush=True)
