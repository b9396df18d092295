"""Loading a model folder: what is read from it, and one line for each way it can be wrong."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from compexport.errors import InputError
from exporter.backbone import Pooling, load_backbone
from tests import models
from tests.models import HIDDEN, LABELS, LAYERS, MAX_LENGTH


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A private copy of tiny-bert."""
    return Path(shutil.copytree(tiny("tiny-bert"), tmp_path / "model"))


def edit(path: Path, **changes: Any) -> None:
    """Change values of a JSON object on disk; None removes one."""
    document = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in document.items() if value is not None}))


def refusal(folder: Path, task: str | None = None) -> str:
    """The one line with which the folder is refused."""
    with pytest.raises(InputError) as caught:
        load_backbone(folder, task)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- good folders -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_sizes(name: str, tiny: Callable[..., Path]) -> None:
    backbone = load_backbone(tiny(name))
    assert (backbone.hidden_size, backbone.num_layers) == (HIDDEN, LAYERS)
    assert backbone.max_length == MAX_LENGTH
    stored = load_file(backbone.folder / "model.safetensors")
    # Nobody reads BART's decoder when features are asked for.
    assert backbone.params == sum(t.numel() for name, t in stored.items() if not name.startswith("decoder."))
    assert not backbone.model.training
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())
    types = ("token_type_ids",) if name in {"tiny-bert", "tiny-electra"} else ()
    assert backbone.input_names == ("input_ids", "attention_mask", *types)


@pytest.mark.parametrize("task", models.HEAD_CLASSES)
def test_task_and_labels_come_from_the_config(task: str, tiny: Callable[..., Path]) -> None:
    backbone = load_backbone(tiny("tiny-bert", task))
    assert backbone.task == task
    assert backbone.labels == LABELS.get(task, [])
    assert backbone.pooling == (Pooling("mean", True) if task == "feature-extraction" else None)


def test_a_pretraining_head_is_left_out(model: Path) -> None:
    edit(model / "config.json", architectures=["BertForMaskedLM"])
    assert load_backbone(model).task == "feature-extraction"


def test_a_generating_model_without_label_words_gives_its_encoder(tmp_path: Path) -> None:
    import transformers

    tiny = models.MODELS["tiny-t5"]
    config = transformers.T5Config(**tiny.config, vocab_size=tiny.tokenizer().get_vocab_size())
    generating = transformers.T5ForConditionalGeneration(config).eval()
    generating.save_pretrained(tmp_path)
    backbone = load_backbone(tmp_path)
    assert (backbone.task, backbone.max_length) == ("feature-extraction", 512)
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        expected = generating.encoder(ids).last_hidden_state
        torch.testing.assert_close(backbone.model(input_ids=ids).last_hidden_state, expected)
    assert backbone.params < sum(parameter.numel() for parameter in generating.parameters())


def test_half_precision_weights_load_as_fp32(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file({name: t.half() for name, t in tensors.items()}, model / "model.safetensors", {"format": "pt"})
    edit(model / "config.json", dtype="float16")
    loaded = load_backbone(model).model.state_dict()
    assert {tensor.dtype for tensor in loaded.values() if tensor.is_floating_point()} == {torch.float32}
    name = "encoder.layer.0.output.dense.weight"
    assert torch.equal(loaded[name], tensors[name].half().float())


# --- pooling ------------------------------------------------------------------------------------------------------


def test_no_pooling_without_modules(model: Path) -> None:
    (model / "modules.json").unlink()
    assert load_backbone(model).pooling is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls+normalize"),
        ({"pooling_mode_mean_tokens": True}, "mean+normalize"),
        ({"pooling_mode_max_tokens": True}, "max+normalize"),
        ({"pooling_mode": "cls"}, "cls+normalize"),
    ],
)
def test_pooling_modes(model: Path, settings: dict[str, Any], expected: str) -> None:
    (model / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert str(load_backbone(model).pooling) == expected


def test_pooling_without_normalize(model: Path) -> None:
    modules = json.loads((model / "modules.json").read_text())[:2]
    (model / "modules.json").write_text(json.dumps(modules))
    assert str(load_backbone(model).pooling) == "mean"


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"pooling_mode_weightedmean_tokens": True}, "pooling_mode_weightedmean_tokens"),
        ({"pooling_mode": "lasttoken"}, "lasttoken"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls, mean"),
        ({}, "none"),
    ],
)
def test_unknown_pooling(model: Path, settings: dict[str, Any], got: str) -> None:
    (model / "1_Pooling" / "config.json").write_text(json.dumps(settings))
    assert refusal(model) == f"{model}: unsupported pooling: got {got}, expected one of cls, mean, max"


def test_pooling_settings_missing(model: Path) -> None:
    (model / "1_Pooling" / "config.json").unlink()
    assert f"{model}/1_Pooling/config.json: unreadable" in refusal(model)


def test_unknown_sentence_transformers_module(model: Path) -> None:
    modules = json.loads((model / "modules.json").read_text())
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (model / "modules.json").write_text(json.dumps(modules))
    assert refusal(model) == f"{model}/modules.json: unsupported module: got Dense, expected Pooling, Normalize"


# --- bad folders --------------------------------------------------------------------------------------------------


def test_no_folder(tmp_path: Path) -> None:
    assert f"{tmp_path}/absent: not a model: got no such folder" in refusal(tmp_path / "absent")


def test_no_config(tmp_path: Path) -> None:
    assert f"{tmp_path}: not a model: got no config.json in it, expected a Hugging Face folder" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["opt", "umt5", "my-own-model"])
def test_unsupported_architecture_names_the_supported(model: Path, kind: str) -> None:
    edit(model / "config.json", model_type=kind)
    message = refusal(model)
    assert f"unsupported architecture: got '{kind}', expected one of albert, bart, bert, distilbert, " in message
    assert "electra, gpt2, mbart, roberta, t5" in message


def test_unsupported_head(model: Path) -> None:
    edit(model / "config.json", architectures=["BertForMultipleChoice"])
    assert "unsupported task head: got BertForMultipleChoice, expected *ForSequenceClassification or" in refusal(model)


def test_unknown_task(model: Path) -> None:
    assert "unknown task: got 'translation', expected sequence-classification, token-" in refusal(model, "translation")


class _Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_pickled_weights_are_refused_and_not_opened(model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    message = refusal(model)
    assert "no safetensors weights: got the pickle pytorch_model.bin, expected model.safetensors;" in message
    assert "pickles are never opened" in message
    assert not (tmp_path / "sprung").exists()


def test_no_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()
    assert "no safetensors weights: got no weights" in refusal(model)


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_cut_weights(model: Path, keep: int) -> None:
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert f"{model}: cannot load the model" in refusal(model)


def test_weights_of_other_sizes(model: Path) -> None:
    edit(model / "config.json", intermediate_size=2 * models.FFN)
    assert f"{model}: cannot load the model" in refusal(model)


def test_a_layer_missing_from_the_weights(model: Path) -> None:
    """Loading would otherwise make up the missing tensors at random."""
    tensors = load_file(model / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layer.1." not in name}
    save_file(kept, model / "model.safetensors", {"format": "pt"})
    assert "layer.1." in refusal(model)


def test_a_task_for_which_the_folder_has_no_head(model: Path) -> None:
    """Loading would otherwise make up a head at random."""
    assert "classifier" in refusal(model, "sequence-classification")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "\x00\x01",
        "{}",
        '{"model_type": 3}',
        "[]",
        "null",
        '"bert"',
        '{"model_type": ["bert"]}',
    ],
)
def test_corrupt_config(model: Path, text: str) -> None:
    (model / "config.json").write_text(text)
    assert str(model) in refusal(model)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"hidden_size": "wide"}, id="hidden_size"),
        pytest.param({"max_position_embeddings": "many"}, id="max_position_embeddings"),
        pytest.param({"num_attention_heads": 5}, id="num_attention_heads"),
        pytest.param({"num_hidden_layers": -1}, id="num_hidden_layers"),
        pytest.param({"architectures": "BertModel"}, id="architectures"),
        pytest.param({"architectures": [7]}, id="architectures of numbers"),
    ],
)
def test_meaningless_config(model: Path, changes: dict[str, Any]) -> None:
    edit(model / "config.json", **changes)
    assert str(model) in refusal(model)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        "[1]",
        '[{"path": ""}]',
        '{"type": "x"}',
    ],
)
def test_corrupt_modules(model: Path, text: str) -> None:
    (model / "modules.json").write_text(text)
    assert f"{model}/modules.json" in refusal(model)


# --- length and tokenizer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sentence", "tokenizer", "expected"),
    [
        (None, MAX_LENGTH, MAX_LENGTH),
        (64, MAX_LENGTH, 64),
        (MAX_LENGTH, 48, 48),
        (None, int(1e30), MAX_LENGTH),
        (10_000, None, MAX_LENGTH),
    ],
)
def test_max_length_is_the_smallest_limit(
    model: Path, sentence: int | None, tokenizer: int | None, expected: int
) -> None:
    edit(model / "tokenizer_config.json", model_max_length=tokenizer)
    if sentence is not None:
        (model / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": sentence}))
    assert load_backbone(model).max_length == expected


def test_roberta_positions_start_after_the_pad_id(tiny: Callable[..., Path]) -> None:
    backbone = load_backbone(tiny("tiny-roberta"))
    assert backbone.max_length == backbone.config.max_position_embeddings - 2
    ids = torch.full((1, backbone.max_length), 5)
    with torch.no_grad():
        backbone.host.embed(backbone.encoder, ids, None)
        with pytest.raises((IndexError, RuntimeError), match="out of (range|bounds)"):
            backbone.host.embed(backbone.encoder, torch.full((1, backbone.max_length + 1), 5), None)


@pytest.mark.parametrize(("tokenizer", "expected"), [(48, 48), (int(1e30), 512), (None, 512), (900, 900)])
def test_relative_positions_set_no_limit(
    tiny: Callable[..., Path], tmp_path: Path, tokenizer: int | None, expected: int
) -> None:
    model = Path(shutil.copytree(tiny("tiny-t5"), tmp_path / "model"))
    edit(model / "tokenizer_config.json", model_max_length=tokenizer)
    assert load_backbone(model).max_length == expected


def test_tokenizer_is_the_file_as_it_is(model: Path) -> None:
    assert load_backbone(model).tokenizer_json == (model / "tokenizer.json").read_text(encoding="utf-8")


def test_tokenizer_from_a_vocabulary(model: Path) -> None:
    """A folder with only ``vocab.txt``, as BERT was published, gives the same ids."""
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(model / "tokenizer.json"))
    words = sorted(fast.get_vocab().items(), key=lambda item: item[1])
    (model / "tokenizer.json").unlink()
    (model / "vocab.txt").write_text("\n".join(word for word, _ in words) + "\n", encoding="utf-8")
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    made = Tokenizer.from_str(load_backbone(model).tokenizer_json)
    for text in models.TEXTS:
        assert made.encode(text).ids == fast.encode(text).ids


def test_no_tokenizer_at_all(model: Path) -> None:
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    with pytest.raises(InputError, match="no usable tokenizer: got .*, expected tokenizer.json") as caught:
        _ = load_backbone(model).tokenizer_json
    assert "\n" not in str(caught.value)
