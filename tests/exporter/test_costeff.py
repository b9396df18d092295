"""The slender multi-exit model: what it shares with its host, what its exits say, what it costs and how it learns."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertConfig

from compexport.errors import InputError
from exporter.backbone import Backbone
from exporter.methods import variator
from exporter.methods.costeff import CosteffModel, cost, exit_statistics
from exporter.methods.slender import HostFacts, SlenderShape, shape_for_ratio, shape_named
from exporter.methods.slender_weights import official_names, slenderised

HOSTS = ["tiny-bert", "tiny-roberta", "tiny-electra", "tiny-distilbert"]
NARROW = SlenderShape((1, 3, 2, 4), (9, 64, 1, 20), 10)
BERT_BASE = HostFacts.of(BertConfig())

Backbones = Callable[..., Backbone]


def random_model(host: Backbone | HostFacts, shape: SlenderShape, seed: int = 0, **options: Any) -> CosteffModel:
    """A model whose every tensor matters, biases and norms too."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CosteffModel(HostFacts.of(host), shape, options.pop("num_labels", 2), **options)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
    return model.eval()


def feeds(backbone: Backbone, lengths: tuple[int, ...] = (9, 5, 1), seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    longest, pad = max(lengths), int(backbone.config.pad_token_id or 0)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, backbone.config.vocab_size, mask.shape, generator=generator)
    made = {"input_ids": torch.where(mask > 0, ids, pad), "attention_mask": mask}
    if "token_type_ids" in backbone.input_names:
        made["token_type_ids"] = torch.randint(0, 2, mask.shape, generator=generator) * mask
    return made


# --- the same function as the host


@pytest.mark.parametrize("name", HOSTS)
def test_the_last_exit_is_the_host_itself(backbone: Backbones, name: str) -> None:
    loaded = backbone(name, "sequence-classification")
    before = copy.deepcopy(loaded.model.state_dict())
    # A copy, since products of one row round as the place of a matrix in memory has it, and a file's is anywhere.
    host = copy.deepcopy(loaded.model)
    model = CosteffModel.from_backbone(loaded)
    assert model.pooler_dense and not model.highway_dense and model.ratio == 1
    for lengths in [(9, 5, 1), (7,), (1,), (160, 3)]:
        feed = feeds(loaded, lengths)
        with torch.no_grad():
            ours, theirs = model(**feed), host(**feed, output_hidden_states=True)
        assert torch.equal(ours.logits[-1], theirs.logits)
        assert all(torch.equal(a, b) for a, b in zip(ours.hidden_states, theirs.hidden_states, strict=True))
        assert len(ours.logits) == loaded.num_layers
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(before[key], value) for key, value in loaded.model.state_dict().items())


def test_without_types_all_tokens_are_of_type_0(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    model, feed = CosteffModel.from_backbone(loaded), feeds(loaded)
    feed["token_type_ids"] = torch.zeros_like(feed["token_type_ids"])
    with torch.no_grad():
        assert torch.equal(model(feed["input_ids"], feed["attention_mask"]).logits[-1], loaded.model(**feed).logits)


@pytest.mark.parametrize("mean", [False, True])
def test_segments_are_the_whole(backbone: Backbones, mean: bool) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    model, feed = random_model(loaded, NARROW, pooler_dense=True, highway_dense=True, mean=mean), feeds(loaded)
    mask = feed["attention_mask"]
    with torch.no_grad():
        whole = model(**feed)
        h = model.embed(feed["input_ids"], feed["token_type_ids"])
        for first, last in [(0, 1), (1, 3), (3, 4)]:
            h = model.run_layers(h, mask, first, last)
            assert torch.equal(h, whole.hidden_states[last])
            assert torch.equal(model.exit_logits(h, mask, last), whole.logits[last - 1])
        # Rows may leave in between: those that stay answer the same.
        rows = torch.tensor([2, 0])
        rest = model.run_layers(whole.hidden_states[1][rows], mask[rows], 1, 4)
        again = model.exit_logits(rest, mask[rows], 4)
        torch.testing.assert_close(again, whole.logits[3][rows], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", HOSTS)
def test_padding_changes_nothing(backbone: Backbones, name: str) -> None:
    loaded = backbone(name, "sequence-classification")
    facts = HostFacts.of(loaded)
    model = random_model(loaded, shape_for_ratio(facts, 2))
    alone, feed = feeds(loaded, (6,)), feeds(loaded, (6,))
    longer = {key: torch.nn.functional.pad(value, (0, 11)) for key, value in feed.items()}
    pad = int(loaded.config.pad_token_id or 0)
    fillings = [torch.full((11,), pad)]
    if facts.position_start is None:  # RoBERTa takes positions from which ids are pad, so other ids are no padding
        fillings.append(torch.arange(5, 16))
    with torch.no_grad():
        expected = model(**alone).logits
        for filling in fillings:
            longer["input_ids"][0, 6:] = filling
            for ours, wanted in zip(model(**longer).logits, expected, strict=True):
                torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=0)


def test_attention_kinds_agree(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    eager = random_model(loaded, NARROW)
    fast = CosteffModel.from_tensors(eager.state_dict(), loaded, "test", attention="sdpa")
    feed = feeds(loaded)
    with torch.no_grad():
        for a, b in zip(eager(**feed).hidden_states, fast(**feed).hidden_states, strict=True):
            real = feed["attention_mask"] > 0
            torch.testing.assert_close(a[real], b[real], atol=1e-5, rtol=0)


# --- making it narrower


def test_a_whole_factorised_table_is_the_table(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    full = SlenderShape.full(loaded)
    whole = CosteffModel.from_backbone(loaded, full)
    factorised = CosteffModel.from_backbone(loaded, SlenderShape(full.heads, full.neurons, 32))
    with torch.no_grad():
        for a, b in zip(whole(**feeds(loaded)).logits[-1:], factorised(**feeds(loaded)).logits[-1:], strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


def test_what_contributes_nothing_may_go(backbone: Backbones) -> None:
    """Heads and neurons whose columns behind them are zero: without them all states stay as they are."""
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    dead_heads, dead_neurons = [[1], [0, 2], [3], []], [[4, 60], range(10, 64), [], [0]]
    tensors = {name: tensor.clone() for name, tensor in official_names(loaded, 2).items()}
    for layer in range(4):
        prefix = f"bert.encoder.layer.{layer}."
        for head in dead_heads[layer]:
            tensors[f"{prefix}attention.output.dense.weight"][:, 8 * head : 8 * head + 8] = 0
        tensors[f"{prefix}output.dense.weight"][:, list(dead_neurons[layer])] = 0
    alive_heads = [[i for i in range(4) if i not in dead] for dead in dead_heads]
    alive_neurons = [[i for i in range(64) if i not in dead] for dead in dead_neurons]
    exits = {f"bert.encoder.highway.{i}.classifier.weight": torch.randn(2, 32) for i in range(3)}
    exits |= {f"bert.encoder.highway.{i}.classifier.bias": torch.randn(2) for i in range(3)}
    wide = CosteffModel.from_tensors({**tensors, **exits}, loaded, "wide")
    kept = slenderised(tensors, 8, alive_heads, alive_neurons, None)
    narrow = CosteffModel.from_tensors({**kept, **exits}, loaded, "narrow")
    assert narrow.shape == SlenderShape((3, 2, 3, 4), (62, 10, 64, 63))
    with torch.no_grad():
        ours, theirs = narrow(**feeds(loaded)), wide(**feeds(loaded))
    for a, b in zip([*ours.logits, *ours.hidden_states], [*theirs.logits, *theirs.hidden_states], strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_from_a_bare_encoder(backbone: Backbones) -> None:
    """As the teaching assistant starts: a pre-trained model without a head."""
    loaded = backbone("tiny-bert-deep")
    model = CosteffModel.from_backbone(loaded, num_labels=3)
    assert not model.pooler_dense and model.num_labels == 3
    feed = feeds(loaded)
    with torch.no_grad():
        ours, theirs = model(**feed), copy.deepcopy(loaded.model)(**feed)
    assert torch.equal(ours.hidden_states[-1], theirs.last_hidden_state)
    assert [tuple(logits.shape) for logits in ours.logits] == [(3, 3)] * 4
    parameter_free = torch.tanh(theirs.last_hidden_state[:, 0]) @ model.classifier.weight.T + model.classifier.bias
    torch.testing.assert_close(ours.logits[-1], parameter_free)


def test_a_pooler_may_be_left_behind(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    model = CosteffModel.from_backbone(loaded, pooler_dense=False)
    assert "bert.pooler.dense.weight" not in model.state_dict()
    # The host's classifier reads its pooler's output; beside another pooler it would be noise.
    assert not torch.equal(model.classifier.weight, loaded.model.classifier.weight)  # type: ignore[union-attr]
    dense = CosteffModel.from_backbone(loaded, highway_dense=True)
    assert dense.pooler_dense and dense.highway_dense
    assert "bert.encoder.highway.2.pooler.dense.weight" in dense.state_dict()


# --- stored tensors


def test_round_trip_of_uneven_widths(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    for dense, highways, mean in itertools.product([False, True], repeat=3):
        model = random_model(loaded, NARROW, num_labels=3, pooler_dense=dense, highway_dense=highways, mean=mean)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        again = CosteffModel.from_tensors(tensors, loaded, "test")
        assert (again.shape, again.num_labels) == (NARROW, 3)
        assert (again.pooler_dense, again.highway_dense, again.mean) == (dense, highways, mean)
        with torch.no_grad():
            for a, b in zip(model(**feeds(loaded)).logits, again(**feeds(loaded)).logits, strict=True):
                assert torch.equal(a, b)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        with torch.no_grad():
            for parameter in again.parameters():
                assert parameter.requires_grad
                parameter.zero_()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in before.items())


LAYER = "bert.encoder.layer.1."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.update({f"{LAYER}attention.self.query.weight": torch.zeros(12, 32)}),
            f"{LAYER}attention.self.query.weight: got 12 rows, expected a multiple of the head width 8",
        ),
        (
            lambda t: t.update({f"{LAYER}attention.self.key.weight": torch.zeros(16, 32)}),
            f"{LAYER}attention.self.key.weight: got [16, 32], expected [24, 32]",
        ),
        (
            lambda t: t.update({f"{LAYER}attention.self.query.weight": torch.zeros(40, 32)}),
            "heads: got 5, expected 1 to 4",
        ),
        (
            lambda t: t.update({f"{LAYER}attention.output.dense.weight": torch.zeros(32, 32)}),
            f"{LAYER}attention.output.dense.weight: got [32, 32], expected [32, 24]",
        ),
        (
            lambda t: t.update({f"{LAYER}intermediate.dense.weight": torch.zeros(0, 32)}),
            "neurons: got 0, expected 1 to 64",
        ),
        (
            lambda t: t.update({f"{LAYER}output.dense.weight": torch.zeros(32, 63)}),
            f"{LAYER}output.dense.weight: got [32, 63], expected [32, 64]",
        ),
        (
            lambda t: t.pop(f"{LAYER}attention.self.query.weight"),
            f"{LAYER}attention.self.query.weight: got nothing, expected a matrix",
        ),
        (lambda t: t.pop("classifier.weight"), "classifier.weight: got nothing, expected a matrix"),
        (lambda t: t.pop("classifier.bias"), "classifier.bias: got nothing, expected [2]"),
        (
            lambda t: t.update({"bert.encoder.highway.0.classifier.weight": torch.zeros(3, 32)}),
            "bert.encoder.highway.0.classifier.weight: got [3, 32], expected [2, 32]",
        ),
        (
            lambda t: t.update({"bert.encoder.highway.3.classifier.weight": torch.zeros(2, 32)}),
            "bert.encoder.highway.3.classifier.weight: got [2, 32], expected no such tensor",
        ),
        (
            lambda t: t.update({"bert.encoder.layer.4.output.dense.bias": torch.zeros(32)}),
            "bert.encoder.layer.4.output.dense.bias: got [32], expected no such tensor",
        ),
        (
            lambda t: t.update({"bert.embeddings.word_embeddings.weight": torch.zeros(9, 32)}),
            "bert.embeddings.word_embeddings.weight: got [9, 32], expected no such tensor",
        ),
        (
            lambda t: t.pop("bert.embeddings.position_embeddings.weight"),
            "bert.embeddings.position_embeddings.weight: got nothing, expected [160, 32]",
        ),
        (
            lambda t: t.update({"bert.embeddings.word_embeddings2.weight": torch.zeros(32, 9)}),
            "bert.embeddings.word_embeddings2.weight: got [32, 9], expected [32, 10]",
        ),
        (
            lambda t: t.update({"bert.embeddings.word_embeddings1.weight": torch.zeros(9, 33)}),
            "rank of the word table: got 33, expected 1 to 32",
        ),
    ],
)
def test_tensors_that_do_not_fit(backbone: Backbones, change: Callable[[Any], Any], message: str) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    tensors = dict(random_model(loaded, NARROW).state_dict())
    change(tensors)
    with pytest.raises(InputError) as caught:
        CosteffModel.from_tensors(tensors, loaded, "here")
    assert str(caught.value) == f"here: {message}"


def test_one_layer_has_one_exit(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert")
    facts = dataclasses.replace(HostFacts.of(loaded), layers=1)
    model = random_model(facts, SlenderShape.uniform(1, 2, 5, 3))
    again = CosteffModel.from_tensors(model.state_dict(), facts, "test")
    with torch.no_grad():
        (ours,), (theirs,) = again(**feeds(loaded)).logits, model(**feeds(loaded)).logits
    assert torch.equal(ours, theirs)


def test_models_without_classes(backbone: Backbones) -> None:
    with pytest.raises(
        InputError, match="exits classify whole texts: got a model for question-answering, expected seq"
    ):
        CosteffModel.from_backbone(backbone("tiny-bert", "question-answering"))
    with pytest.raises(InputError, match="exits classify whole texts: got a model for feature-extraction"):
        CosteffModel.from_backbone(backbone("tiny-bert"))
    with pytest.raises(InputError, match="does not fit this architecture: got 't5'"):
        CosteffModel.from_backbone(backbone("tiny-t5"), num_labels=2)
    with pytest.raises(InputError, match="labels: got 1, expected at least 2"):
        CosteffModel.from_backbone(backbone("tiny-bert"), num_labels=1)
    with pytest.raises(InputError, match="shape a4_l3_f64: layers: got 3, expected 2"):
        CosteffModel.from_backbone(backbone("tiny-bert"), SlenderShape.uniform(3, 4, 64), num_labels=2)


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_other_problems_than_one_label(backbone: Backbones, problem: str) -> None:
    loaded = copy.deepcopy(backbone("tiny-bert", "sequence-classification"))
    loaded.config.problem_type = problem
    with pytest.raises(InputError, match=f"exits need one label per text: got {problem}, expected single_label"):
        CosteffModel.from_backbone(loaded)
    headless = copy.deepcopy(backbone("tiny-bert"))
    headless.config.problem_type = problem  # of a head that is not there any more
    assert CosteffModel.from_backbone(headless, num_labels=2).num_labels == 2


# --- sizes


@pytest.mark.parametrize(
    ("name", "params", "share", "macs_share"),
    [
        ("a6", 54_984_984, "1.99", "2.00"),
        ("a4", 36_813_336, "2.97", "3.00"),
        ("a2", 18_641_688, "5.87", "6.00"),
        ("a2-half", 13_920_024, "7.87", "8.88"),
    ],
)
def test_published_sizes(name: str, params: int, share: str, macs_share: str) -> None:
    with torch.device("meta"):
        model = CosteffModel(BERT_BASE, shape_named(BERT_BASE, name), 2)
        full = CosteffModel(BERT_BASE, SlenderShape.full(BERT_BASE), 2, pooler_dense=True)
    a, f, e = model.shape.heads[0], model.shape.neurons[0], model.shape.embedding or 0
    assert model.params == params == params_by_hand(a, f, e, classes=2)
    bert = full.params - sum(t.numel() for n, t in full.state_dict().items() if "highway" in n)
    assert bert == 109_483_778  # BERT-base with a classifier of two labels
    assert f"{bert / params:.2f}" == share

    def encoder(of: CosteffModel) -> int:
        product = (of.shape.embedding or 0) * 768 * 128
        return cost(of, exits=()).macs(128) - product

    assert f"{encoder(full) / encoder(model):.2f}" == macs_share


def params_by_hand(a: int, f: int, e: int, classes: int) -> int:
    """Section by section: embeddings, twelve layers, eleven exits and the classifier."""
    v, d, w = 30522, 768, 64
    embeddings = v * e + d * e + 512 * d + 2 * d + 2 * d
    attention = 3 * (d * w * a + w * a) + w * a * d + d + 2 * d
    feed_forward = d * f + f + f * d + d + 2 * d
    return embeddings + 12 * (attention + feed_forward) + 12 * (d * classes + classes)


def test_cost_at_full_width_is_the_hosts(backbone: Backbones) -> None:
    for name in HOSTS:
        loaded = backbone(name, "sequence-classification")
        full, plain = cost(CosteffModel.from_backbone(loaded)), variator.cost(loaded, None)
        assert [full.macs(n) for n in (1, 7, 128)] == [plain.macs(n) for n in (1, 7, 128)]


def test_costs_of_segments_add_up(backbone: Backbones) -> None:
    model = random_model(backbone("tiny-bert-deep"), NARROW, num_labels=3, pooler_dense=True, highway_dense=True)
    parts = [cost(model, 0, 1), cost(model, 1, 3), cost(model, 3, 4)]
    together = cost(model, exits=(1, 3, 4))
    assert [sum(part.macs(n) for part in parts) for n in (1, 50)] == [together.macs(n) for n in (1, 50)]
    # By hand, at 50 tokens: the table's product, 10 heads and 94 neurons in all, three heads with dense poolers.
    layers = 10 * (4 * 32 * 8 * 50 + 2 * 8 * 50 * 50) + 94 * 2 * 32 * 50
    assert together.macs(50) == 10 * 32 * 50 + layers + 3 * (32 * 32 + 32 * 3)
    assert cost(model, exits=range(1, 5)).macs(9) - cost(model, exits=()).macs(9) == 4 * (32 * 32 + 32 * 3)


@pytest.mark.parametrize("dense", [False, True])
def test_exits_that_read_the_mean_too(backbone: Backbones, dense: bool) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    model, feed = random_model(loaded, NARROW, num_labels=3, pooler_dense=dense, mean=True), feeds(loaded)
    with torch.no_grad():
        found = model(**feed)
        for row, length in enumerate((9, 5, 1)):
            h = found.hidden_states[2][row, :length]
            read = torch.cat((h[0], h.mean(0))).tanh()
            classifier = model.get_submodule("bert.encoder.highway.1.classifier")
            torch.testing.assert_close(classifier(read), found.logits[1][row], atol=1e-5, rtol=0)
        # What stands in padded places does not count, nor how many there are.
        wider = {name: torch.nn.functional.pad(tensor, (0, 3), value=0) for name, tensor in feed.items()}
        for a, b in zip(model(**wider).logits, found.logits, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    # The host's own pooler reads the first token alone, so the last exit can stay the host itself.
    final = cost(model, exits=(4,)).fixed
    assert final == (32 * 32 + 32 * 3 if dense else 64 * 3) and cost(model, exits=(1,)).fixed == 64 * 3


# --- exits


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_statistics_at_both_ends(classes: int, dtype: torch.dtype) -> None:
    equal = exit_statistics(torch.full((1, classes), 3.0, dtype=dtype))
    assert equal.entropy.item() == pytest.approx(math.log(classes), abs=1e-6)
    assert equal.max_probability.item() == pytest.approx(1 / classes, abs=1e-6) and equal.margin.item() == 0
    sure = torch.zeros(1, classes, dtype=dtype)
    sure[0, 1] = 1e4  # where softmax first and logarithm then gives NaN
    found = exit_statistics(sure)
    assert (found.entropy.item(), found.max_probability.item(), found.margin.item()) == (0, 1, 1)
    assert {t.dtype for t in found} == {torch.float32}


@settings(deadline=None)
@given(rows=st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_statistics_of_any_logits(rows: list[list[float]]) -> None:
    logits = torch.tensor(rows)
    found = exit_statistics(logits)
    exact = torch.softmax(logits.double(), dim=-1)
    entropy = -torch.special.xlogy(exact, exact).sum(-1)
    torch.testing.assert_close(found.entropy.double(), entropy, atol=2e-5, rtol=0)
    ordered = exact.sort(descending=True).values
    torch.testing.assert_close(found.max_probability.double(), ordered[:, 0], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.margin.double(), ordered[:, 0] - ordered[:, 1], atol=1e-5, rtol=0)
    assert (found.entropy >= 0).all()  # -1, "never", is below all of them


def test_statistics_say_nothing_of_what_is_no_number() -> None:
    for broken in (float("nan"), float("inf")):
        found = exit_statistics(torch.tensor([[0.0, broken, 1.0], [0.0, 1.0, 2.0]]))
        for statistic in found:
            assert torch.isnan(statistic[0]) and torch.isfinite(statistic[1])


def test_statistics_of_many_exits() -> None:
    logits = torch.randn(4, 3, 5)
    stacked = exit_statistics(logits)
    for exit_ in range(3):
        alone = exit_statistics(logits[:, exit_])
        assert all(torch.equal(a[:, exit_], b) for a, b in zip(stacked, alone, strict=True))


def leaving(entropies: Tensor, tau: float) -> list[int]:
    """Entropies [B,L] -> the layer, counted from 1, at which each row leaves."""
    sure = entropies < tau
    sure[:, -1] = True
    return (sure.int().argmax(dim=1) + 1).tolist()


def test_thresholds(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    model = random_model(loaded, NARROW)
    with torch.no_grad():
        logits = torch.stack(model(**feeds(loaded, tuple(range(1, 31)))).logits, dim=1)
    logits[3] = 0.5  # as unsure as can be, at every exit
    entropies = exit_statistics(logits).entropy
    assert leaving(entropies, -1) == [4] * 30  # never, and the last exit is the whole model's answer
    assert leaving(entropies, math.log(2) + 1e-6) == [1] * 30
    assert leaving(entropies, math.log(2))[3] == 4  # the comparison is strict
    sweep = [leaving(entropies, tau) for tau in torch.linspace(-1, 0.75, 36).tolist()]
    for patient, hasty in pairwise(sweep):
        assert all(late >= early for late, early in zip(patient, hasty, strict=True))
    assert len({tuple(depths) for depths in sweep}) > 5


# --- learning


def gradients(model: CosteffModel, feed: dict[str, Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    model.zero_grad()
    logits = model(**feed).logits
    sum((i + 1) * x.square().sum() for i, x in enumerate(logits)).backward()  # type: ignore[union-attr]
    return logits, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_every_layer_learns_the_mean_of_the_predictions_above_it(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    model, feed = random_model(loaded, NARROW, pooler_dense=True, highway_dense=True).double(), feeds(loaded)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    balanced_logits, balanced = gradients(model, feed)
    model.gradient_equilibrium = False
    plain_logits, plain = gradients(model, feed)
    assert all(torch.equal(a, b) for a, b in zip(balanced_logits, plain_logits, strict=True))
    model.gradient_equilibrium = True
    model.eval()
    quiet_logits, quiet = gradients(model, feed)
    assert all(torch.equal(a, b) for a, b in zip(quiet_logits, plain_logits, strict=True))
    assert balanced.keys() == plain.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        share = 1.0
        if name.startswith("bert.encoder.layer."):
            share = 1 / (4 - int(name.split(".")[3]))
        elif name.startswith("bert.embeddings."):
            share = 1 / 4  # what layer 0 hands down
        assert gradient.abs().max() > 0
        torch.testing.assert_close(balanced[name], gradient * share, rtol=1e-9, atol=1e-12, msg=name)
        torch.testing.assert_close(quiet[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_dropout_is_for_training_only(backbone: Backbones) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    model, feed = random_model(loaded, NARROW), feeds(loaded)
    with torch.no_grad(), torch.random.fork_rng():
        still = [model(**feed).logits[-1] for _ in range(2)]
        moving = [model.train()(**feed).logits[-1] for _ in range(2)]
    assert torch.equal(*still) and not torch.equal(*moving)
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
