"""Commands on a family of decoders: bench times one more token, select and run count all of them, evaluate foresees."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.points import token_name
from tests.engines.decoders import NAMES, make_bundle

Cli = Callable[..., Any]
R1, R2, R4 = NAMES.values()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("writing") / "bundle").path


@pytest.fixture
def bundle(made: Path, tmp_path: Path, cli: Cli) -> Path:
    """At ``./bundle``, with ``texts.txt`` beside it."""
    (tmp_path / "texts.txt").write_text("Once upon a time\nit was so\nand then\n", encoding="utf-8")
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def test_the_whole_way(cli: Cli, bundle: Path) -> None:
    table = cli("bench", "--batch", "1,2", "--length", "4,16", "--min-runs", "3", "--threads", 1)
    assert table.code == 0 and "one more token" in table.out and "is faster than the backbone" in table.out
    document = cli("bench", "--batch", "1,2", "--length", "4,16", "--min-runs", "3", "--threads", 1, "--json").document
    names = {*NAMES.values(), *map(token_name, NAMES.values())}
    assert {row["variant"] for row in document["rows"]} == names
    assert {row["variant"] for row in document["realised"]} == names - {R1, token_name(R1)}
    evaluated = cli("evaluate", "--data", "texts.txt", "--threads", 1, "--json").document
    assert evaluated["metric"] == "next_token_accuracy" and evaluated["n"] == 3
    assert all(row["perplexity"] > 1 for row in evaluated["variants"])
    asked = ("select", "--budget-ms", "1e6", "--length", 4, "--max-new-tokens")
    few, many = (
        {row["variant"]: row["predicted_ms"] for row in cli(*asked, n, "--threads", 1, "--json").document["candidates"]}
        for n in (1, 20)
    )
    assert all(many[name] > few[name] for name in NAMES.values())
    arguments = ("--text", "Once", "--max-new-tokens", 5, "--budget-ms", "1e6", "--threads", 1)
    written = cli("run", *arguments, "--json").document
    assert written["variant"] in NAMES.values() and written["predicted_ms"] > 0 and written["met_budget"]
    (output,) = written["outputs"]
    assert set(output) == {"text", "tokens", "why"} and 1 <= len(output["tokens"]) <= 5
    shown = cli("run", *arguments)
    assert f"{output['text']!r}"[:20] in shown.out and f"{len(output['tokens'])} tokens" in shown.out


def test_the_same_seed_draws_the_same_text(cli: Cli, bundle: Path) -> None:
    def text(*options: object) -> str:
        return str(cli("run", "--text", "Once", "--ratio", 2, *options, "--json").document["outputs"][0]["text"])

    drawn = ("--temperature", 2, "--top-k", 100, "--top-p", 0.99)
    assert text(*drawn) == text(*drawn, "--seed", 0) != text(*drawn, "--seed", 1)
    assert text() == text("--seed", 3), "the likeliest tokens, whatever the seed"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("run", "--text", "a", "--top-k", 3), "only a temperature above 0 draws tokens: got top_k"),
        (
            ("run", "--text", "a", "--text-pair", "b"),
            "text 0 (counted from 0) is a pair: expected one text",
        ),
        (("run", "--text", "a", "--max-new-tokens", 99), "max_new_tokens: got 99, expected at most 48"),
        (("bench", "--length", 48), "--length is too long: got 48, expected at most 47 tokens"),
        (("run", "--text", "a", "--threshold", 0.3), "exit thresholds need a variant"),
    ],
)
def test_what_is_refused(cli: Cli, bundle: Path, arguments: tuple[Any, ...], error: str) -> None:
    done = cli(*arguments)
    assert done.code == 2 and error in done.error
