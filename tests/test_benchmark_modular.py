"""The benchmark of assemblies: what it makes of its rows, the models it starts from, and the whole of it in small."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import modular, writers
from exporter.backbone import load_seq2seq

WORDS = [("aback", "AH0 B AE1 K"), ("act", "AE1 K T"), ("at", "AE1 T"), ("bat", "B AE1 T"), ("cab", "K AE1 B")]


def test_the_targets_are_of_size_first_assemblies() -> None:
    def row(form: str, ratio: float, value: float) -> dict[str, Any]:
        return {"form": form, "ratio": ratio, "word_accuracy": value, "word_error_rate": 1 - value}

    rows = [row("base", 1, 0.6), row("size-first", 2, 0.58), row("size-first", 6, 0.5), row("speed-first", 3, 0.3)]
    made = modular.relative(rows)
    assert [round(one["relative_loss"], 4) for one in made] == [0.0, 0.0333, 0.1667, 0.5]
    assert round(made[1]["relative_error_rise"], 4) == 0.05
    assert not modular.missed(made)
    assert modular.missed(modular.relative([*rows, row("size-first", 3, 0.5)])) == ["3 times fewer layers: 0.167"]


def test_words_are_scored_against_all_pronunciations(tmp_path: Path) -> None:
    (tmp_path / "dev.variants.tsv").write_text("source\ttarget\nat\tAE1 T\nat\tAE0 T\n")
    scores = modular.word_scores(["AE0 T", "B AE1"], tmp_path, ["at", "bat"], ["AE1 T", "B AE1 T"])
    assert scores == {"word_accuracy": 0.5, "word_error_rate": 0.5, "phoneme_error_rate": 0.2}


@pytest.mark.parametrize("model", [writers.t5, writers.mbart])
def test_a_shrunk_model_is_made_of_spaced_layers(model: Callable[..., Any], tmp_path: Path) -> None:
    assert writers.spaced(12, 4) == [0, 4, 7, 11] and writers.spaced(12, 12) == list(range(12))
    size = writers.Size(encoder=4, decoder=3, hidden=16, ffn=32, heads=2)
    base = writers.make(tmp_path / "base", model, writers.spelling_tokenizer, WORDS, size)
    smaller = writers.Size(encoder=2, decoder=2, hidden=16, ffn=32, heads=2)
    found = load_seq2seq(writers.shrunk(base, tmp_path / "small", model, smaller))
    original = load_seq2seq(base)
    for kept, stack, whole in zip(
        ((0, 3), (0, 2)), found.host.stacks(found.model), original.host.stacks(original.model), strict=True
    ):
        for layer, number in zip(found.host.layers_of(stack), kept, strict=True):
            theirs = found.host.layers_of(whole)[number].state_dict()
            assert all(torch.equal(one, theirs[name]) for name, one in layer.state_dict().items() if name in theirs)


@pytest.mark.slow
@pytest.mark.usefixtures("traces")
def test_all_of_it_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train", "dev", "dev.variants"):
        lines = ["source\ttarget", *("\t".join(row) for row in WORDS * (3 if name == "train" else 1))]
        (data / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    command = ["cmudict", "--data", str(data), "--work", str(tmp_path / "work"), "--quick"]
    assert modular.main([*command, "--out", str(tmp_path / "modular_TASK.json")]) == 0
    result = json.loads((tmp_path / "modular_cmudict.json").read_text())
    forms = [(row["form"], row["ratio"], row["layers"]) for row in result["rows"]]
    both = [(1.5, 8), (2, 6), (3, 4), (6, 2)]
    assert forms == [("base", 1, 12), *(("size-first", *one) for one in both), *(("speed-first", *one) for one in both),
                     *((form, *one) for form in ("scratch", "shrink") for one in both[1:])]  # fmt: skip
    assert result["quick"] and result["recipe"]["model"] == "t5" and result["train"]["steps"] == 2
    # What is there is not done again.
    monkeypatch.setattr(modular.training, "train", lambda *args, **options: pytest.fail("trained again"))
    assert modular.main([*command, "--out", str(tmp_path / "again_TASK.json")]) == 0
    assert json.loads((tmp_path / "again_cmudict.json").read_text())["rows"] == result["rows"]
