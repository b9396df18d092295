"""BERT-of-Theseus checkpoints: successors become the layers of a plain BERT."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from compexport.errors import InputError
from exporter.backbone import load_backbone
from exporter.importers.theseus import import_theseus
from tests.models import wordpiece_vocabulary

LAYERS, SUCCESSORS = 6, 3
Tensors = dict[str, Tensor]


class Theseus(nn.Module):
    """What the official code holds and how it answers: successors run in the layers' place, one after the other."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.config = transformers.BertConfig(
            vocab_size=len(wordpiece_vocabulary()),
            hidden_size=16,
            num_hidden_layers=LAYERS,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=40,
            initializer_range=0.3,
            num_labels=3,
        )
        torch.manual_seed(seed)
        self.plain = transformers.BertForSequenceClassification(self.config).eval()
        other = transformers.BertForSequenceClassification(self.config).eval()
        self.successors = other.bert.encoder.layer[:SUCCESSORS]

    def tensors(self) -> Tensors:
        named = {f"bert.encoder.scc_layer.{name}": tensor for name, tensor in self.successors.state_dict().items()}
        positions = {"bert.embeddings.position_ids": torch.arange(40)[None]}
        return {**self.plain.state_dict(), **named, **positions}

    def forward(self, input_ids: Tensor) -> Tensor:
        bert: Any = self.plain.bert
        states = bert.embeddings(input_ids)
        for layer in self.successors:
            states = layer(states)
            states = states[0] if isinstance(states, tuple) else states
        logits: Tensor = self.plain.classifier(bert.pooler(states))
        return logits


def write(folder: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """As that code left it: a pickle of tensors, and a configuration that names neither kind nor class."""
    model = Theseus()
    folder.mkdir()
    raw = {**model.config.to_dict(), **config}
    kept = {name: value for name, value in raw.items() if name not in ("model_type", "architectures") or name in config}
    (folder / "config.json").write_text(json.dumps(kept))
    (folder / "vocab.txt").write_text("\n".join(wordpiece_vocabulary()) + "\n")
    torch.save(model.tensors() if tensors is None else tensors, folder / "pytorch_model.bin")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "theseus")


def test_successors_become_a_plain_model(folder: Path, tmp_path: Path) -> None:
    done = import_theseus(folder, tmp_path / "out")
    assert (done.task, done.layers, done.replaced, done.span) == ("sequence-classification", 3, 6, 2)
    loaded = load_backbone(tmp_path / "out")
    assert (loaded.num_layers, len(loaded.labels)) == (3, 3)
    assert done.params == loaded.params < sum(tensor.numel() for tensor in Theseus().tensors().values())
    ids = torch.randint(5, 90, (2, 7))
    with torch.no_grad():
        assert torch.allclose(loaded.model(input_ids=ids).logits, Theseus()(ids), atol=1e-6)
        assert not torch.allclose(loaded.model(input_ids=ids).logits, Theseus().plain(ids).logits, atol=1e-3)
    assert "minute" in loaded.tokenizer_json
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "theseus"]


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def with_tensor(name: str, tensor: Tensor) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("scc_layer"), "no successors: got a plain model"),
        (without("scc_layer.1."), "successors: got none of number 1, expected 0 to 2"),
        (without("encoder.layer.5."), "predecessors: got 5, expected 6, as in config.json"),
        (without("scc_layer.2.output.dense.bias"), "layer.2.output.dense.bias: got nothing"),
        (without("pooler.dense.weight"), "bert.pooler.dense.weight: got nothing"),
        (with_tensor("bert.extra", torch.ones(2)), r"bert.extra: got \[2\], expected no such tensor"),
        (with_tensor("classifier.bias", torch.ones(4)), r"classifier.bias: got \[4\], expected \[3\]"),
        (with_tensor("classifier.bias", torch.full((3,), torch.nan)), "classifier.bias: got NaN or infinity"),
        (with_tensor("bert.encoder.scc_layer.3.x", torch.ones(1)), "successors: got 4, expected a number that divides"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[Tensors], Tensors], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "theseus", change(Theseus().tensors()))
    with pytest.raises(InputError, match=message):
        import_theseus(folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["theseus"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "roberta"}, "model_type: got 'roberta', expected 'bert'"),
        ({"architectures": ["BertForMaskedLM"]}, "architectures: got BertForMaskedLM, expected BertForSequence"),
        ({"num_hidden_layers": "many"}, "config.json: unreadable: got ValueError: num_hidden_layers many"),
    ],
)
def test_a_configuration_of_something_else(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        import_theseus(write(tmp_path / "theseus", **config), tmp_path / "out")


def test_an_output_that_is_there_and_a_tokenizer_that_is_not(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(InputError, match="out: already there: expected a new folder"):
        import_theseus(folder, tmp_path / "out")
    (folder / "vocab.txt").unlink()
    with pytest.raises(InputError, match="no tokenizer: expected vocab.txt or tokenizer.json; copy that of the BERT"):
        import_theseus(folder, tmp_path / "new")
