"""A command line in this process, and a tiny bundle with everything measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compexport.cli import main

TEXTS = [
    "a fine film with a quiet heart",
    "what a waste of two hours!",
    "Return the value of the named option, or the default.",
    "the camera moves slowly over the old town",
]


@dataclass(frozen=True)
class Done:
    """What a command left: exit code, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """Stdout as the one JSON document that it must be."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> str:
        """Stderr as the one line that it must be."""
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("compexport: ")
        return lines[0].removeprefix("compexport: ")


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """``cli("build", model, "--ratio", "2")`` in an empty current folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """A tiny classifier built at ratios 1, 2, 4 with random plugins, measured and evaluated. Do not write into it."""
    from compexport import api

    folder = tmp_path_factory.mktemp("built")
    api.build_document(
        tiny("tiny-bert", "sequence-classification"), ratios=[2, 4], output=folder / "bundle", untrained=True
    )
    api.bench(folder / "bundle", batches=[1, 4], lengths=[8, 32], min_runs=5)
    api.evaluate(folder / "bundle", labelled_texts(folder))
    return folder / "bundle"


@pytest.fixture
def bundle(built: Path, tmp_path: Path) -> Path:
    """A private copy of the tiny bundle, at ``./bundle`` of the current folder."""
    import shutil

    return Path(shutil.copytree(built, tmp_path / "bundle"))


def labelled_texts(folder: Path) -> Path:
    """A small classification data set with a header."""
    path = folder / "dev.tsv"
    rows = [f"{text}\t{('negative', 'positive')[i % 2]}" for i, text in enumerate(TEXTS)]
    path.write_text("\n".join(["sentence\tlabel", *rows]) + "\n", encoding="utf-8")
    return path


def plain_texts(folder: Path) -> Path:
    """A file with one text a line."""
    path = folder / "texts.txt"
    path.write_text("\n".join(TEXTS * 4) + "\n", encoding="utf-8")
    return path
