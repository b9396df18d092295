"""``compexport build`` of modular models and ``compexport export``, as commands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from compexport import api
from compexport.errors import InputError
from tests.compexport.conftest import Done

TASK = "text2text-generation"
EVEN = {"even": {"encoder": [2, 2], "decoder": [2, 2]}}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("tiny-t5-four", TASK)


@pytest.fixture(scope="module")
def bundle(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base, an even assembly of it, and their pairs. Do not write into it."""
    folder = tmp_path_factory.mktemp("modular")
    (folder / "more.json").write_text(json.dumps(EVEN))
    more = api.Assemblies(more=folder / "more.json", pairs=True)
    api.build(model, ratios=[1], output=folder / "bundle", assemblies=more, untrained=True)
    return folder / "bundle"


def test_named_assemblies_and_pairs(bundle: Path, model: Path, cli: Callable[..., Done]) -> None:
    Path("more.json").write_text(json.dumps(EVEN))
    copy = shutil.copytree(bundle, "copy")
    options = ["--assemblies", "more.json", "--pairs", "--untrained", "-o", copy, "--json"]
    done = cli("build", model, "--ratio", "1", *options)
    assert done.code == 0, done.err
    rows = {row["variant"]: row for row in done.document["variants"]}
    assert list(rows) == [
        "modular-r1-fp32",
        "modular-even-fp32",
        "modular-e4x1-d2x2-fp32",
        "modular-e2x2-d4x1-fp32",
    ]
    assert all(row["reused"] for row in rows.values())
    assert [row["untrained"] for row in rows.values()] == [False, True, True, True]
    assert cli("verify", copy).code == 0
    inspected = cli("inspect", copy, "--json").document
    assert inspected["variants"]["modular-even-fp32"]["assembly"] == EVEN["even"]
    assert "modular-even-fp32" in cli("inspect", copy).out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--ratio", "2", "--strategy", "fastest"],
            "--strategy: got 'fastest', expected size-first or speed-first or calibrated",
        ),
        (["--ratio", "2", "--strategy", "calibrated"], "calibrated chooses on texts and targets: expected --data FILE"),
        (["--assemblies", "even"], "--assemblies even: got 'even', expected a JSON file"),
        (["--assemblies", "wrong.json"], "wrong.json: even: no assembly"),
        (["--assemblies", "list.json"], "--assemblies list.json: got list"),
        (
            ["--assemblies", "nameless.json"],
            "--assemblies nameless.json: got an assembly without a name, expected",
        ),
        (["--assemblies", "gone.json"], "--assemblies gone.json: got no such file, expected a JSON file"),
        (["--data", "x.tsv"], "--data: got the method modular, expected none; --strategy calibrated chooses on them"),
        (["--exits", "2"], "--exits: got the method modular, expected costeff or ode"),
        (["--ratio", "9"], "ratio: got 9, expected at most 4 for this model"),
    ],
)
def test_what_means_nothing(model: Path, cli: Callable[..., Done], arguments: list[str], message: str) -> None:
    Path("wrong.json").write_text(json.dumps({"even": {"encoder": [2, 2]}}))
    Path("list.json").write_text("[]")
    Path("nameless.json").write_text(json.dumps(EVEN["even"]))
    done = cli("build", model, "--untrained", *arguments)
    assert done.code == 2 and message in done.error, done.err
    assert not Path("bundle").exists()


def test_other_methods_assemble_nothing(tiny: Callable[..., Path], cli: Callable[..., Done]) -> None:
    done = cli("build", tiny("tiny-bert"), "--untrained", "--pairs")
    assert done.code == 2 and "--pairs: got the method variator, expected modular" in done.error


def test_an_exported_variant_stands_alone(bundle: Path, cli: Callable[..., Done]) -> None:
    shutil.copytree(bundle, "gone")
    done = cli("export", "gone", "--variant", "modular-even-fp32", "-o", "out", "--json")
    assert done.code == 0, done.err
    assert cli("verify", "gone").code == 0  # its files have no other names now
    shutil.rmtree("gone")
    names = ["encoder_model.onnx", "decoder_model.onnx", "decoder_with_past_model.onnx"]
    others = {"weights.bin", "config.json", "tokenizer.json", "generation_config.json"}
    assert set(done.document["files"]) >= {*names, *others}
    assert not [path for path in Path().iterdir() if path.name.startswith(".out")]
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_layers"], config["num_decoder_layers"], config["model_type"]) == (2, 2, "t5")
    sessions = [onnxruntime.InferenceSession(f"out/{name}", providers=["CPUExecutionProvider"]) for name in names]
    ids = np.array([[5, 6, 7, 1]])
    states = sessions[0].run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    feed = {"encoder_attention_mask": np.ones_like(ids), "input_ids": ids[:, :1], "encoder_hidden_states": states}
    logits, *cache = sessions[1].run(["logits"], feed)
    assert np.isfinite(logits).all() and not cache
    assert sum(one.name.startswith("past_key_values") for one in sessions[2].get_inputs()) == 2 * 4
    whole = (bundle / "graphs" / "weights.bin").stat().st_size
    assert 0 < Path("out/weights.bin").stat().st_size < whole


def test_what_cannot_be_exported(bundle: Path, cli: Callable[..., Done]) -> None:
    Path("full").mkdir()
    Path("full/mine.txt").write_text("")
    for arguments, message in (
        (["--variant", "modular-r9-fp32"], "unknown variant: got modular-r9-fp32, expected one of modular-r1-fp32"),
        (["-o", "full"], "output full exists"),
    ):
        done = cli("export", bundle, *arguments)
        assert done.code == 2 and message in done.error
    assert sorted(path.name for path in Path().iterdir()) == ["full"]


def test_only_what_reads_and_writes_is_exported(built: Path) -> None:
    with pytest.raises(InputError, match="export is for bundles of one task"):
        api.export(built, "nowhere")
