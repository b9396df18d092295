"""Every host and task: the parts put together are the Hugging Face model, bit for bit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compexport.errors import InputError
from exporter.backbone import Backbone, load_backbone
from exporter.hosts import HOSTS, host_of
from exporter.methods.variator import VariatorModel, output_names
from exporter.parity import probe_feeds
from tests.exporter.conftest import random_plugins
from tests.models import MODELS

every_host_and_task = pytest.mark.parametrize(
    ("name", "task"), [(name, task) for name, tiny in MODELS.items() for task in tiny.classes]
)
OUTPUTS = {
    "feature-extraction": ("last_hidden_state", "sentence_embedding"),
    "sequence-classification": ("logits",),
    "token-classification": ("logits",),
    "question-answering": ("start_logits", "end_logits"),
    "label-words": ("logits",),
}


def _feeds(backbone: Backbone) -> list[dict[str, Tensor]]:
    config = backbone.config
    types = getattr(config, "type_vocab_size", 1)
    feeds = probe_feeds(backbone.input_names, 3, config.vocab_size, 40, types, config.pad_token_id)
    assert any((feed["attention_mask"] == 0).any() for feed in feeds)
    return [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in feeds]


@torch.no_grad()
def _run(model: VariatorModel, feeds: list[dict[str, Tensor]]) -> list[tuple[Tensor, ...]]:
    return [model(**feed) for feed in feeds]


@every_host_and_task
def test_without_plugins_it_is_the_hugging_face_model(name: str, task: str, backbone: Callable[..., Backbone]) -> None:
    loaded = backbone(name, task)
    assert output_names(loaded) == OUTPUTS[task]
    feeds = _feeds(loaded)
    for feed, got in zip(feeds, _run(VariatorModel(loaded), feeds), strict=True):
        with torch.no_grad():
            expected = _hugging_face(loaded, feed)
        for key, tensor in zip(OUTPUTS[task], got, strict=True):
            if key == "sentence_embedding":
                torch.testing.assert_close(tensor, _mean(expected.last_hidden_state, feed["attention_mask"]))
            elif task == "label-words":  # a product with two rows of the vocabulary rounds otherwise than with all
                torch.testing.assert_close(tensor, expected[key], atol=1e-5, rtol=1e-5)
            else:
                assert torch.equal(tensor, expected[key]), key


def _hugging_face(backbone: Backbone, feed: dict[str, Tensor]) -> Any:
    """The model's own outputs; for label words, of its whole vocabulary after the prefix, those of the words."""
    words = backbone.label_words
    if words is None:
        return backbone.model(**feed)
    prefix = torch.tensor(words.decoder_input_ids).expand(len(feed["input_ids"]), -1)
    scores = backbone.model(**feed, decoder_input_ids=prefix).logits[:, -1]
    return {"logits": torch.stack([scores[:, number] for number in words.word_ids], 1)}


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """The mean of the real tokens' vectors, at length 1, text by text."""
    rows = [vectors[: int(row.sum())].mean(0) for vectors, row in zip(hidden, mask, strict=True)]
    return torch.stack([row / row.norm() for row in rows])


@every_host_and_task
@pytest.mark.parametrize("pad", ["masked", "official"])
def test_attaching_running_and_detaching_leaves_no_trace(
    name: str, task: str, pad: str, backbone: Callable[..., Backbone]
) -> None:
    loaded = backbone(name, task)
    feeds = _feeds(loaded)[-2:]
    model = VariatorModel(loaded)
    outputs = _run(model, feeds)
    before = _portrait(loaded.model)
    model.variator.attach(random_plugins(loaded, 4, pad))
    changed = _run(model, feeds)
    assert all((a - b).abs().max() > 1e-3 for one, two in zip(outputs, changed, strict=True)
               for a, b in zip(one, two, strict=True))  # fmt: skip
    model.variator.detach()
    assert _portrait(loaded.model) == before
    for one, two in zip(outputs, _run(model, feeds), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def _portrait(model: nn.Module) -> object:
    """All that attaching could have changed: tensors, modules, hooks, methods put over methods."""
    return (
        {name: tensor.numpy().tobytes() for name, tensor in model.state_dict().items()},
        [
            (name, type(module), "forward" in vars(module), len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in model.named_modules()
        ],
        model.training,
    )


@every_host_and_task
def test_the_attention_used_in_training_gives_the_same(
    name: str, task: str, tiny: Callable[..., Path], backbone: Callable[..., Backbone]
) -> None:
    feeds = _feeds(backbone(name, task))[-2:]
    models = (VariatorModel(load_backbone(tiny(name, task), attention=kind)) for kind in ("eager", "sdpa"))
    one, two = (_run(model, feeds) for model in models)
    for feed, a, b in zip(feeds, one, two, strict=True):
        real = feed["attention_mask"] == 1
        for x, y in zip(a, b, strict=True):
            if x.shape[:2] == real.shape:  # one per token
                x, y = x[real], y[real]
            torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["tiny-bart", "tiny-mbart"])
@torch.no_grad()
def test_a_decoder_with_biases(name: str, tiny: Callable[..., Path]) -> None:
    """A fresh model has none: they are zero. Cross-attention treats those of keys and values in its own way."""
    loaded = load_backbone(tiny(name, "label-words"))
    for key, parameter in loaded.model.named_parameters():
        if key.endswith("bias"):
            parameter.normal_(std=0.5)
    loaded.model.final_logits_bias.normal_()
    feeds = _feeds(loaded)
    for feed, (got,) in zip(feeds, _run(VariatorModel(loaded), feeds), strict=True):
        expected = _hugging_face(loaded, feed)["logits"]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prefix", [[2], [2, 5, 9, 7, 11]])
@pytest.mark.parametrize("name", ["tiny-t5-gated", "tiny-bart", "tiny-mbart"])
def test_prefixes_of_any_length(name: str, prefix: list[int], backbone: Callable[..., Backbone]) -> None:
    loaded = backbone(name, "label-words")
    assert loaded.label_words is not None
    words = loaded.label_words.model_copy(update={"decoder_input_ids": prefix})
    loaded = dataclasses.replace(loaded, label_words=words)
    feeds = _feeds(loaded)[-2:]
    for feed, (got,) in zip(feeds, _run(VariatorModel(loaded), feeds), strict=True):
        with torch.no_grad():
            expected = _hugging_face(loaded, feed)["logits"]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_unknown_architecture_names_the_supported_ones() -> None:
    with pytest.raises(
        InputError,
        match="got 'opt', expected one of albert, bart, bert, distilbert, electra, gpt2, mbart, roberta, t5",
    ):
        host_of("opt", Path("model"))
    assert sorted(HOSTS) == ["albert", "bart", "bert", "distilbert", "electra", "gpt2", "mbart", "roberta", "t5"]
