"""Spans: merged once, merged to the end; what must hold with any weights, stored, traced and built."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compexport.errors import InputError
from engines.bundle import Bundle
from exporter.backbone import Backbone, load_backbone
from exporter.checkpoint import save_checkpoint
from exporter.family import build
from exporter.methods import variator
from exporter.methods.span import SpanPlugins, default_rank
from exporter.methods.variator import VariatorEncoder, VariatorModel, VariatorPlugins, plugins_from_tensors
from tests.exporter.conftest import random_plugins
from tests.models import LAYERS
from tests.traces import Traces

TASK = "sequence-classification"
HOSTS = ("tiny-bert", "tiny-roberta", "tiny-distilbert", "tiny-electra")


def span_of(backbone: Backbone, ratio: int, first: int = 1, rank: int = 3) -> SpanPlugins:
    """A span whose every tensor matters."""
    with torch.random.fork_rng():
        torch.manual_seed(ratio)
        plugins = SpanPlugins(backbone, ratio, first, rank)
        with torch.no_grad():
            for parameter in plugins.parameters():
                parameter.normal_(std=0.3)
    return plugins.eval()


def feed_of(backbone: Backbone, real: list[int], length: int, pad_id: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(5, backbone.config.vocab_size, (len(real), 64), generator=generator)
    mask = (torch.arange(length) < torch.tensor(real)[:, None]).long()
    return {"input_ids": torch.where(mask == 1, tokens[:, :length], pad_id), "attention_mask": mask}


def logits_of(backbone: Backbone, plugins: SpanPlugins | None, feed: dict[str, Tensor]) -> Tensor:
    model = VariatorModel(backbone).eval()
    if plugins is not None:
        model.variator.attach(plugins)
    with torch.no_grad():
        return model(**feed)[0]


@pytest.fixture
def classifier(backbone: Callable[..., Backbone]) -> Backbone:
    return backbone("tiny-bert", TASK)


@pytest.mark.parametrize("name", HOSTS)
def test_every_classifier_answers_and_detaching_leaves_no_trace(name: str, backbone: Callable[..., Backbone]) -> None:
    loaded = backbone(name, TASK)
    feed = feed_of(loaded, [9, 4], 9)
    expected = logits_of(loaded, None, feed)
    model = VariatorModel(loaded).eval()
    model.variator.attach(span_of(loaded, 4))
    with torch.no_grad():
        assert (model(**feed)[0] - expected).abs().max() > 1e-3
        model.variator.detach()
        assert torch.equal(model(**feed)[0], expected)


def test_the_last_plugins_attached_are_the_ones_in_use(classifier: Backbone) -> None:
    feed, around = feed_of(classifier, [9, 4], 9), random_plugins(classifier, 4)
    encoder = VariatorEncoder(classifier)
    encoder.attach(around)
    with torch.no_grad():
        expected = encoder(**feed).last_hidden_state
        encoder.attach(span_of(classifier, 4))
        encoder.attach(around)
        assert torch.equal(encoder(**feed).last_hidden_state, expected)


@pytest.mark.parametrize("first", range(LAYERS))
def test_ratio_one_without_updates_is_the_backbone(first: int, classifier: Backbone) -> None:
    feed = feed_of(classifier, [9, 4], 9)
    found = logits_of(classifier, SpanPlugins(classifier, 1, first, 2), feed)
    assert torch.equal(found, logits_of(classifier, None, feed))


@pytest.mark.parametrize("ratio", [2, 4])
def test_the_first_token_stays_alone(ratio: int, classifier: Backbone) -> None:
    plugins = span_of(classifier, ratio)
    h, mask = torch.randn(2, 2 * ratio + 1, classifier.hidden_size), torch.ones(2, 2 * ratio + 1)
    merged, groups = plugins.merge(h, mask)
    assert merged.shape[1] == 3 and groups.tolist() == [[1.0] * 3] * 2
    torch.testing.assert_close(merged[:, 0], h[:, 0])
    moved = h.clone()
    moved[:, ratio + 1 :] += 1.0  # the last group's tokens
    torch.testing.assert_close(plugins.merge(moved, mask)[0][:, :2], merged[:, :2], rtol=0, atol=0)


def test_equal_weights_merge_to_what_hidden_states_are_taught(classifier: Backbone) -> None:
    plugins = SpanPlugins(classifier, 4, 1, 2)
    feed = feed_of(classifier, [10, 3], 10)
    states = VariatorEncoder(classifier)(**feed, keep_states=True).hidden_states
    mask = feed["attention_mask"].float()
    goals = plugins.goals(states, mask)
    assert [goal.shape[1] for goal, _ in goals] == [10, 10, 4]
    merged, groups = plugins.merge(states[2], mask)
    torch.testing.assert_close(goals[2][1], groups)
    torch.testing.assert_close(goals[2][0], merged)


@pytest.mark.parametrize("ratio", [2, 3, 8])
def test_padding_changes_nothing(ratio: int, classifier: Backbone) -> None:
    plugins = span_of(classifier, ratio)
    alone = logits_of(classifier, plugins, feed_of(classifier, [7], 7))
    for length in (8, 9, 16):
        for pad_id in (0, 4):
            padded = logits_of(classifier, plugins, feed_of(classifier, [7], length, pad_id))
            torch.testing.assert_close(padded, alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("first", range(LAYERS))
def test_costs_are_the_products_that_run(first: int, classifier: Backbone) -> None:
    plugins = span_of(classifier, 4, first)
    model = VariatorModel(classifier).eval()
    model.variator.attach(plugins)
    groups_of_ones = 4 * 4 + 4  # the merged mask: not counted, nothing learnt
    for length in (1, 5, 6, 16):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**feed_of(classifier, [length], length))
        groups = 1 + -(-(length - 1) // 4)
        expected = counter.get_total_flops() // 2 - groups * groups_of_ones
        assert variator.cost(classifier, plugins).macs(length) == expected


def test_updates_take_at_most_a_hundredth(tmp_path: Path) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "vocab_size": 9000}
    config = transformers.BertConfig(**sizes, num_attention_heads=4, architectures=["BertForSequenceClassification"])
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path)
    wide = load_backbone(tmp_path)
    rank = default_rank(wide, 2, 2)
    assert rank > 1 and SpanPlugins(wide, 2, 2, rank).params <= 0.01 * wide.params
    assert SpanPlugins(wide, 2, 2, rank + 1).params > 0.01 * wide.params


def test_only_its_own_tensors_get_gradients(classifier: Backbone) -> None:
    plugins = span_of(classifier, 2).requires_grad_(True)
    model = VariatorModel(classifier).eval()
    model.variator.attach(plugins)
    model(**feed_of(classifier, [6], 6))[0].sum().backward()
    assert all(one.grad is not None and one.grad.abs().max() > 0 for one in plugins.parameters())
    assert all(one.grad is None for one in classifier.model.parameters())


def test_stored_tensors_come_back(classifier: Backbone) -> None:
    plugins = span_of(classifier, 4)
    found = plugins_from_tensors(dict(plugins.state_dict()), classifier, "masked", "file")
    assert isinstance(found, SpanPlugins) and (found.ratio, found.first, found.rank) == (4, 1, 3)
    assert all(torch.equal(one, found.state_dict()[name]) for name, one in plugins.state_dict().items())
    around = random_plugins(classifier, 4)
    assert isinstance(plugins_from_tensors(dict(around.state_dict()), classifier, "masked", "file"), VariatorPlugins)


def _without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(next(key for key in tensors if name in key))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("mixer.bias"), "file: no span"),
        (_without("mixer.weight"), "file: mixer.weight: got nothing"),
        (_without("up"), "got nothing"),
        (lambda tensors: tensors.update({"low_rank.1.more.up": torch.zeros(2)}), "expected no such tensor"),
        (lambda tensors: tensors.update({"mixer.weight": torch.zeros(2, 2)}), "mixer.weight: got (2, 2)"),
        (lambda tensors: tensors.update({"low_rank.9.x.down": torch.zeros(3, 2)}), "expected no such tensor"),
    ],
)
def test_damaged_tensors_are_refused(damage: Callable[..., Any], message: str, classifier: Backbone) -> None:
    tensors = dict(span_of(classifier, 4).state_dict())
    damage(tensors)
    with pytest.raises(InputError) as error:
        plugins_from_tensors(tensors, classifier, "masked", "file")
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-t5"])
def test_models_whose_answer_needs_all_tokens_are_refused(name: str, backbone: Callable[..., Backbone]) -> None:
    with pytest.raises(InputError, match=r"--span: got a model for feature-extraction"):
        SpanPlugins(backbone(name), 2, 1, 2)


@pytest.mark.parametrize("first", [-1, LAYERS])
def test_layers_that_are_not_there_are_refused(first: int, classifier: Backbone) -> None:
    with pytest.raises(InputError, match=rf"--span: got {first + 1}.*from 1 to {LAYERS}"):
        SpanPlugins(classifier, 2, first, 2)


def test_a_family_of_spans_is_built_beside_plugins_of_the_other_form(
    classifier: Backbone, tmp_path: Path, traces: Traces
) -> None:
    """Every graph is compared with PyTorch as it is written; the backbone's tensors are there once."""
    tensors = {
        2: random_plugins(classifier, 2).state_dict(),
        3: span_of(classifier, 3, first=0).state_dict(),
        4: span_of(classifier, 4).state_dict(),
    }
    save_checkpoint(tmp_path / "fitted", classifier.folder, "variator", {"pad": "masked"}, tensors)
    report = build(tmp_path / "fitted", [2, 3, 4], tmp_path / "bundle")
    variants = report.manifest.variants
    assert variants["variator-r4-fp32"].settings == {"pad": "masked", "rank": 3, "k": 4, "span": 2}
    assert "span" not in variants["variator-r2-fp32"].settings
    graphs = report.manifest.graphs
    assert all(graphs[name].parity.max_abs <= 1e-4 for name in ("r1", "r2", "r3", "r4"))
    assert graphs["r1"].cost.macs(128) / graphs["r4"].cost.macs(128) == variants["variator-r4-fp32"].flops_ratio
    bundle = Bundle.open(tmp_path / "bundle")
    backbone = stored(bundle.file(graphs["r1"].path))
    for ratio, one in tensors.items():
        new = {
            place: size
            for place, size in stored(bundle.file(graphs[f"r{ratio}"].path)).items()
            if place not in backbone
        }
        assert 0 < sum(new.values()) <= sum(tensor.numel() * 4 for tensor in one.values())


def stored(graph: Path) -> dict[int, int]:
    """Offset -> bytes of all that a graph reads from the weights file."""
    model = onnx.load(graph, load_external_data=False)
    entries = [{entry.key: entry.value for entry in tensor.external_data} for tensor in model.graph.initializer]
    return {int(entry["offset"]): int(entry["length"]) for entry in entries if entry}
