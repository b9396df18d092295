"""A command line in this process, and a tiny bundle with everything measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from compexport.cli import main
from tests import models
from tests.traces import Traces

TEXTS = [
    "a fine film with a quiet heart",
    "what a waste of two hours!",
    "Return the value of the named option, or the default.",
    "the camera moves slowly over the old town",
]


LABELS = ("good", "bad", "neither")


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
        """The one line on stderr that says what went wrong, the last one; lines of progress may come before it."""
        *before, last = self.err.strip().splitlines()
        assert last.startswith("compexport: "), self.err
        assert not [line for line in before if line.startswith("compexport: ") or "Traceback" in line], self.err
        return last.removeprefix("compexport: ")


@pytest.fixture(scope="package", autouse=True)
def _remembered_traces(trace_memory: Traces) -> Iterator[None]:
    """Commands trace the same tiny models over and over: what is built of a trace is what they are tested for."""
    with pytest.MonkeyPatch.context() as patch:
        trace_memory.replace(patch)
        yield


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
def built(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], trace_memory: Traces) -> Path:
    """A tiny classifier built at ratios 1, 2, 4 with random plugins. Do not write into it.

    Its latency and quality are made up, so that what is chosen is known: ratio r takes 40 / r ms at every size.
    """
    from compexport import api

    folder = tmp_path_factory.mktemp("built") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        trace_memory.replace(patch)
        api.build_document(tiny("tiny-bert", "sequence-classification"), ratios=[2, 4], output=folder, untrained=True)
    with api.load(folder) as runtime:
        rows = [
            {"variant": f"variator-r{r}-fp32", "batch": b, "length": n, "p50_ms": 36 / r, "p99_ms": 40 / r, "runs": 9}
            for r in (1, 2, 4)
            for b in (1, 4)
            for n in (4, 160)
        ]
        runtime.bundle.save_profile(runtime.device, {"device": runtime.device, "backend": "ort", "rows": rows})
        values = {"variator-r1-fp32": 0.9, "variator-r2-fp32": 0.8, "variator-r4-fp32": 0.7}
        quality = {"metric": "accuracy", "higher_is_better": True, "n": 4, "data": "made up", "variants": values}
        runtime.bundle.save_quality({**quality, "backbone_variant": "variator-r1-fp32"})
    return folder


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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with train.tsv (48 rows, three labels that the words tell) and dev.tsv (12)."""
    return labelled_rows(tmp_path / "data")


@pytest.fixture(scope="session")
def kept_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, for runs that several tests look at. Do not write into it."""
    return labelled_rows(tmp_path_factory.mktemp("kept") / "data")


def labelled_rows(folder: Path) -> Path:
    """Write that folder."""
    folder.mkdir()
    rows = [f"{LABELS[n % 3]} {models.TEXTS[n % 8]} {n}\t{LABELS[n % 3]}" for n in range(60)]
    (folder / "train.tsv").write_text("\n".join(["sentence\tlabel", *rows[:48]]) + "\n")
    (folder / "dev.tsv").write_text("\n".join(["sentence\tlabel", *rows[48:]]) + "\n")
    return folder
