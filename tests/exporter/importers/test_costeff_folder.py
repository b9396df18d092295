"""What an import of a COST-EFF checkpoint writes, what it adds to, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compexport.errors import InputError
from exporter.backbone import load_backbone
from exporter.checkpoint import DESCRIPTION, save_checkpoint
from exporter.importers.costeff import import_costeff
from tests.exporter.importers import costeff_official as official
from tests.exporter.importers.costeff_official import Sizes, Tensors

SIZES = Sizes()


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write(folder: Path, sizes: Sizes = SIZES, seed: int = 0) -> Path:
    return official.write(folder, sizes, official.random_tensors(sizes, seed))


def write_teacher(folder: Path, sizes: Sizes = SIZES, **changes: Any) -> Path:
    """A fine-tuned BERT of full width, as the slender models' teacher."""
    config = transformers.BertConfig(
        **{
            "vocab_size": sizes.vocab,
            "hidden_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "num_attention_heads": sizes.hidden // sizes.head_width,
            "intermediate_size": sizes.wide,
            "max_position_embeddings": sizes.positions,
            **changes,
        }
    )
    with torch.random.fork_rng():
        torch.manual_seed(11)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    source = official.write(folder.with_name(f"{folder.name}-tokenizer"), SIZES, {})
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((source / name).read_bytes())


def test_a_checkpoint_alone(tmp_path: Path) -> None:
    source = write(tmp_path / "SST-2")
    before = contents(source)
    done = import_costeff(source, None, tmp_path / "deep" / "out")
    out = tmp_path / "deep" / "out"
    assert contents(source) == before
    ratio = f"{SIZES.ratio:.2f}"
    assert ratio == "1.88"
    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "model.safetensors",
        "vocab.txt",
        "tokenizer_config.json",
        "special_tokens_map.json",
        DESCRIPTION,
        f"costeff-r{ratio}.safetensors",
    }
    settings = json.loads((out / DESCRIPTION).read_text())["settings"]
    assert settings == {
        "shapes": {ratio: {"heads": [2] * 4, "neurons": [20] * 4, "embedding": 7}},
        "imported": {
            ratio: {
                "file": "pytorch_model.bin",
                "sha256": before["pytorch_model.bin"],
                "backbone": "the same function at full width",
                "kept_heads": [[1, 2]] * 4,
            }
        },
    }
    loaded = load_backbone(out)
    assert (loaded.task, loaded.labels, loaded.max_length) == ("sequence-classification", ["LABEL_0", "LABEL_1"], 48)
    assert "film" in json.loads(loaded.tokenizer_json)["model"]["vocab"]
    assert (loaded.config.num_attention_heads, loaded.config.intermediate_size) == (3, 50)
    assert not hasattr(loaded.config, "prun_hidden_size") and not hasattr(loaded.config, "head_to_distill")
    assert not loaded.config.output_hidden_states
    params = sum(tensor.numel() for tensor in official.random_tensors(SIZES).values())
    assert (done.ratio, done.ratios, done.tensors) == (1.88, [1.88], len(official.random_tensors(SIZES)))
    assert (done.params, done.params_share) == (params, params / loaded.params)
    assert (done.backbone, done.backbone_from_file) == (str(source), True)
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_beside_its_teacher(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", id2label={0: "bad", 1: "good"}, label2id={"bad": 0, "good": 1})
    before = contents(teacher)
    done = import_costeff(write(tmp_path / "official"), teacher, tmp_path / "out")
    assert contents(teacher) == before
    after = contents(tmp_path / "out")
    assert {name: after[name] for name in before} == before
    assert {*after} - {*before} == {DESCRIPTION, "costeff-r1.88.safetensors"}
    assert load_backbone(tmp_path / "out").labels == ["bad", "good"]
    assert (done.backbone, done.backbone_from_file) == (str(teacher), False)


def test_more_ratios_of_one_teacher(tmp_path: Path) -> None:
    teacher, out = write_teacher(tmp_path / "teacher"), tmp_path / "out"
    small = replace(SIZES, heads=(1,) * 4, neurons=(10,) * 4, rank=3)
    assert import_costeff(write(tmp_path / "two"), teacher, out).ratios == [1.88]
    assert import_costeff(write(tmp_path / "one", small), teacher, out).ratios == [1.88, 3.77]
    assert import_costeff(write(tmp_path / "again", seed=1), teacher, out).ratios == [1.88, 3.77]
    settings = json.loads((out / DESCRIPTION).read_text())["settings"]
    assert settings["shapes"]["3.77"] == {"heads": [1] * 4, "neurons": [10] * 4, "embedding": 3}
    assert set(settings["shapes"]) == set(settings["imported"]) == {"1.88", "3.77"}
    assert import_costeff(write(tmp_path / "one", small), out, out).ratios == [1.88, 3.77]


def test_whole_ratios_have_no_fraction(tmp_path: Path) -> None:
    full = replace(SIZES, heads=(3,) * 4, neurons=(50,) * 4, rank=None)
    assert import_costeff(write(tmp_path / "assistant", full), None, tmp_path / "out").ratios == [1]
    assert (tmp_path / "out" / "costeff-r1.safetensors").is_file()


def test_a_ratio_of_1_is_the_full_width(tmp_path: Path) -> None:
    """A word table of lower rank leaves the layers whole: such a model would stand for the backbone."""
    wide = write(tmp_path / "wide", replace(SIZES, heads=(3,) * 4, neurons=(50,) * 4, rank=7))
    with pytest.raises(InputError, match="wide: ratio 1, which is the full width: got a3_l4_f50_e7, expected fewer"):
        import_costeff(wide, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_backbone_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    import_costeff(write(tmp_path / "official"), None, out)
    before = contents(out)
    other = write(tmp_path / "other", seed=1)
    with pytest.raises(InputError, match=r"out: already there: got another backbone.*; .*name the teacher of all"):
        import_costeff(other, None, out)
    with pytest.raises(InputError, match="out: already there: expected a new folder, or a checkpoint of the same back"):
        import_costeff(other, write_teacher(tmp_path / "teacher"), out)
    assert contents(out) == before
    assert import_costeff(tmp_path / "official", None, out).ratios == [1.88]
    assert import_costeff(other, out, out).ratios == [1.88]


def test_a_folder_of_another_method_is_refused(tmp_path: Path) -> None:
    teacher, out = write_teacher(tmp_path / "teacher"), tmp_path / "out"
    save_checkpoint(out, teacher, "variator", {}, {2: {"x": torch.zeros(1)}})
    before = contents(out)
    with pytest.raises(InputError, match="out: a checkpoint of another method: got variator, expected costeff"):
        import_costeff(write(tmp_path / "official"), teacher, out)
    assert contents(out) == before


def test_the_official_folder_is_no_model_folder(tmp_path: Path) -> None:
    source = write(tmp_path / "official")
    expected = (
        f"{source}: a COST-EFF checkpoint, whatever model_type its config.json says: got prun_hidden_size 16, expected "
        f"layers of full width; `compexport import costeff {source} -o OUT` makes a model folder of it"
    )
    with pytest.raises(InputError) as caught:
        load_backbone(source)
    assert str(caught.value) == expected
    with pytest.raises(InputError, match="makes a model folder of it"):
        import_costeff(source, source, tmp_path / "out")


# --- refusals


@pytest.fixture
def refusal(tmp_path: Path) -> Callable[..., str]:
    """Import what must be refused; gives the one line after checking that nothing was written."""

    def refuse(source: Path, backbone: Path | None = None) -> str:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(InputError) as caught:
            import_costeff(source, backbone, tmp_path / "refused")
        assert sorted(tmp_path.rglob("*")) == before
        assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
        return str(caught.value)

    return refuse


QUERY = "bert.encoder.layer.1.attention.self.query.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("classifier.bias"), "classifier.bias: got nothing, expected [2]"),
        (
            lambda t: t.update({QUERY: torch.zeros(12, 24)}),
            f"{QUERY}: got 12 rows, expected a multiple of the head wid",
        ),
        (
            lambda t: t.update({QUERY: torch.zeros(24, 24)}),
            "attention.output.dense.weight: got [24, 16], expected [24, ",
        ),
        (lambda t: t.update({QUERY: torch.zeros(32, 24)}), "heads: got 4, expected 1 to 3"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "extra: got [1], expected no such tensor"),
        (
            lambda t: t.update({"bert.encoder.highway.3.classifier.bias": torch.zeros(2)}),
            "bert.encoder.highway.3.classifier.bias: got [2], expected no such tensor",
        ),
        (
            lambda t: t.update({"bert.pooler.dense.weight": torch.zeros(24, 24)}),
            "bert.pooler.dense.bias: got nothing, expected [24]",
        ),
        (lambda t: t["classifier.bias"].fill_(float("nan")), "classifier.bias: got NaN or infinity"),
        (lambda t: t.update(step=3), "step: got int, expected a tensor"),
    ],
)
def test_tensors(tmp_path: Path, refusal: Callable[..., str], change: Callable[[Tensors], Any], message: str) -> None:
    tensors = official.random_tensors(SIZES)
    change(tensors)
    assert message in refusal(official.write(tmp_path / "official", SIZES, tensors))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_attention_heads": 1, "prun_hidden_size": 8},
            "config.json describes: num_attention_heads: got 2, expected",
        ),
        ({"prun_intermediate_size": 21}, "config.json describes: prun_intermediate_size: got 20, expected 21"),
        ({"emb_hidden_dim": 8}, "config.json describes: emb_hidden_dim: got 7, expected 8"),
        ({"emb_hidden_dim": -1}, "config.json describes: emb_hidden_dim: got 7, expected -1"),
        ({"pooler_dense": True}, "config.json describes: pooler_dense: got False, expected True"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, "config.json describes: num_labels: got 2, expected 3"),
        ({"num_hidden_layers": 3}, "bert.encoder.highway.2.classifier.bias: got [2], expected no such tensor"),
        ({"num_hidden_layers": 5}, "bert.encoder.layer.4.attention.self.query.weight: got nothing, expected a matrix"),
        ({"hidden_size": 32}, "bert.embeddings.position_embeddings.weight: got [48, 24], expected [48, 32]"),
        ({"hidden_size": 8 * 10**18}, "bert.embeddings.position_embeddings.weight: got [48, 24], expected [48, 80"),
        ({"vocab_size": 10**18}, "bert.embeddings.word_embeddings1.weight: got ["),
        ({"num_hidden_layers": 10**18}, "bert.encoder.layer.4.attention.self.query.weight: got nothing"),
        ({"type_vocab_size": 1}, "bert.embeddings.token_type_embeddings.weight: got [2, 24], expected [1, 24]"),
        ({"id2label": {"0": "a", "5": "b"}}, "config.json: unreadable: got"),
        ({"vocab_size": 99}, "bert.embeddings.word_embeddings1.weight: got ["),
        (
            {"max_position_embeddings": 512},
            "bert.embeddings.position_embeddings.weight: got [48, 24], expected [512, 24]",
        ),
        ({"intermediate_size": 19}, "neurons: got 20, expected 1 to 19"),
        ({"prun_hidden_size": 15}, "prun_hidden_size of 2 heads: got 15, expected 2 x a head width that divides 24"),
        ({"prun_hidden_size": 20}, "prun_hidden_size of 2 heads: got 20"),
        ({"prun_hidden_size": 48}, "prun_hidden_size of 2 heads: got 48"),
        ({"prun_hidden_size": 0}, "prun_hidden_size: got 0, expected a whole number of at least 1"),
        ({"prun_hidden_size": "16"}, "prun_hidden_size: got 16, expected a whole number of at least 1"),
        ({"num_attention_heads": None}, "num_attention_heads: got nothing, expected a whole number"),
        ({"emb_hidden_dim": -2}, "emb_hidden_dim: got -2, expected a whole number of at least 1"),
        ({"pooling_mode": "avg"}, "pooling_mode: got avg, expected cls, the published setting"),
        ({"last_n_hidden": 2}, "last_n_hidden: got 2, expected 1, the published setting"),
        ({"model_type": "roberta"}, "model_type: got roberta, expected bert"),
        ({"hidden_act": 3}, "config.json: unreadable: got"),
    ],
)
def test_configurations(tmp_path: Path, refusal: Callable[..., str], changes: dict[str, Any], message: str) -> None:
    document = {**official.config(SIZES), **changes}
    assert message in refusal(official.write(tmp_path / "official", SIZES, official.random_tensors(SIZES), document))


def test_no_labels_are_too_few(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "labels: got 1, expected at least 2" in refusal(write(tmp_path / "official", replace(SIZES, classes=1)))


def test_folders(tmp_path: Path, refusal: Callable[..., str]) -> None:
    assert "none: no COST-EFF checkpoint: got no such folder, expected the folder" in refusal(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    assert "empty: no COST-EFF checkpoint: got no config.json in it" in refusal(tmp_path / "empty")
    bert = write_teacher(tmp_path / "bert")
    assert "no COST-EFF checkpoint: got a configuration of 'bert' without prun_hidden_size" in refusal(bert)
    for text, message in [
        ("[]", "no model's: got []"),
        ("{", "unreadable: got Expecting"),
        ("\xff", "unreadable"),
        ("[" * 9999, "unreadable"),
    ]:
        (tmp_path / "empty" / "config.json").write_text(text, encoding="latin-1")
        assert message in refusal(tmp_path / "empty")
    source = write(tmp_path / "official")
    (source / "vocab.txt").rename(tmp_path / "vocab.txt")
    assert "no tokenizer: expected vocab.txt or tokenizer.json; copy that of the BERT it was made" in refusal(source)
    (source / "pytorch_model.bin").unlink()
    assert "vocab.txt: no COST-EFF checkpoint: got a file, expected the folder" in refusal(tmp_path / "vocab.txt")
    assert "no weights: expected model.safetensors or pytorch_model.bin" in refusal(source)
    (source / "model.safetensors").write_bytes(b"cut")
    assert "model.safetensors: unreadable" in refusal(source)
    with pytest.raises(InputError, match="is the root of the file system"):
        import_costeff(source, None, "/")


def test_a_pickle_that_runs_something(tmp_path: Path, refusal: Callable[..., str]) -> None:
    source = write(tmp_path / "official")
    torch.save({"x": Evil()}, source / "pytorch_model.bin")
    assert "pytorch_model.bin: not a file of tensors: got a pickle that calls" in refusal(source)
    assert not Path("pwned").exists()


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return (os.system, ("touch pwned",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, "was made from: layers: got 3, expected 4"),
        ({"hidden_size": 48}, "was made from: hidden: got 48, expected 24"),
        ({"num_attention_heads": 6}, "was made from: heads: got 6, expected 3"),
        ({"intermediate_size": 60}, "was made from: neurons: got 60, expected 50"),
        ({"vocab_size": 999}, "was made from: vocabulary: got 999, expected"),
        ({"max_position_embeddings": 99}, "was made from: positions: got 99, expected 48"),
        ({"layer_norm_eps": 1e-5}, "was made from: norm epsilon: got 1e-05, expected 1e-12"),
        ({"hidden_act": "relu"}, "was made from: activation: got relu, expected gelu"),
        (
            {"num_labels": 3},
            "got a model for sequence-classification with 3 labels, expected sequence-classification with",
        ),
    ],
)
def test_teachers_of_other_models(
    tmp_path: Path, refusal: Callable[..., str], changes: dict[str, Any], message: str
) -> None:
    teacher = write_teacher(tmp_path / "teacher", **changes)
    assert message in refusal(write(tmp_path / "official"), teacher)


def test_teachers_of_other_labels_or_words(tmp_path: Path, refusal: Callable[..., str]) -> None:
    three = replace(SIZES, classes=3)
    names = {i: f"kind {i}" for i in range(3)}
    teacher = write_teacher(tmp_path / "teacher", id2label=names, label2id={v: k for k, v in names.items()})
    source = write(tmp_path / "official", three)
    assert "other labels than" in refusal(source, teacher)
    unnamed = write_teacher(tmp_path / "unnamed", num_labels=3)
    assert import_costeff(source, unnamed, tmp_path / "out").ratio == 1.88
    (unnamed / "vocab.txt").write_text("other\n")
    assert "vocab.txt: other words than" in refusal(source, unnamed)


def test_a_dropout_of_its_own_is_no_other_model(tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path / "teacher", hidden_dropout_prob=0.3, initializer_range=0.1)
    assert import_costeff(write(tmp_path / "official"), teacher, tmp_path / "out").ratio == 1.88
