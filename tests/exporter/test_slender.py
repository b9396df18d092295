"""Widths of slender models, and weights made narrower: pure functions of sizes and tensors."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BartConfig, BertConfig, DistilBertConfig, ElectraConfig, RobertaConfig

from compexport.errors import InputError
from exporter.backbone import Backbone
from exporter.methods.slender import PRESETS, HostFacts, SlenderShape, shape_for_ratio, shape_named
from exporter.methods.slender_weights import WORDS, WORDS_LEFT, WORDS_RIGHT, factorised, official_names, slenderised

BERT_BASE = HostFacts.of(BertConfig())
MINILM = HostFacts.of(BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536))
DEEP_MINILM = HostFacts.of(
    BertConfig(hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536)
)
TINY = HostFacts.of(BertConfig(hidden_size=24, num_hidden_layers=3, num_attention_heads=3, intermediate_size=50))


def uniform(shape: SlenderShape) -> tuple[int, int, int | None]:
    assert len(set(shape.heads)) == len(set(shape.neurons)) == 1
    return shape.heads[0], shape.neurons[0], shape.embedding


# --- widths


@pytest.mark.parametrize(
    ("name", "sizes", "ratio"),
    [
        ("a6", (6, 1536, 384), 2),
        ("a4", (4, 1024, 256), 3),
        ("a2", (2, 512, 128), 6),
        ("a6-half", (6, 768, 384), 3),
        ("a4-half", (4, 512, 256), 4.5),
        ("a2-half", (2, 256, 128), 9),
    ],
)
def test_presets_of_bert_base(name: str, sizes: tuple[int, int, int], ratio: float) -> None:
    shape = shape_named(BERT_BASE, name)
    assert uniform(shape) == sizes
    assert shape.ratio(BERT_BASE) == ratio
    assert str(shape) == "a{}_l12_f{}_e{}".format(*sizes)
    assert shape_named(BERT_BASE, str(shape)) == shape
    assert set(PRESETS) == {"a6", "a4", "a2", "a6-half", "a4-half", "a2-half"}


def test_presets_keep_the_same_shares_of_other_hosts() -> None:
    assert uniform(shape_named(MINILM, "a2-half")) == (2, 128, 64)
    assert shape_named(MINILM, "a2-half").layers == 6
    assert uniform(shape_named(TINY, "a2")) == (1, 8, 4)  # 0.5 of a head is one
    large = HostFacts.of(
        BertConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096)
    )
    assert uniform(shape_named(large, "a6")) == (8, 2048, 512)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a3", "unknown preset: got 'a3', expected one of a6, a4, a2, a6-half"),
        ("a2_l12_f256_e", "unknown preset"),
        ("a2_l6_f256_e128", "preset a2_l6_f256_e128: layers: got 6, expected 12"),
        ("a13_l12_f256", "heads: got 13, expected 1 to 12"),
        ("a0_l12_f256", "heads: got 0, expected 1 to 12"),
        ("a2_l12_f4000_e128", "neurons: got 4000, expected 1 to 3072"),
        ("a2_l12_f256_e769", "rank of the word table: got 769, expected 1 to 768"),
    ],
)
def test_names_that_fit_no_host(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        shape_named(BERT_BASE, name)


def test_exact_sizes_by_name() -> None:
    assert uniform(shape_named(BERT_BASE, "a5_l12_f700")) == (5, 700, None)
    assert uniform(shape_named(BERT_BASE, "a5_l12_f700_e-1")) == (5, 700, None)
    assert uniform(shape_named(BERT_BASE, "a5_l12_f700_e100")) == (5, 700, 100)


@pytest.mark.parametrize(
    ("ratio", "sizes"),
    [
        (1, (12, 3072, None)),
        (2, (6, 1536, 384)),
        (3, (4, 1024, 256)),
        (4, (3, 768, 192)),
        (8, (2, 320, 128)),
        (9, (1, 384, 64)),
        (12, (1, 256, 64)),
    ],
)
def test_widths_of_a_ratio(ratio: float, sizes: tuple[int, int, int | None]) -> None:
    assert uniform(shape_for_ratio(BERT_BASE, ratio)) == sizes


@settings(deadline=None)
@given(ratio=st.floats(1, 12), host=st.sampled_from([BERT_BASE, MINILM, DEEP_MINILM]))
def test_a_ratio_is_met_as_nearly_as_it_can(ratio: float, host: HostFacts) -> None:
    shape = shape_for_ratio(host, ratio)
    shape.require_fit(host, "test")
    # Four neurons more or less, at 64 or more of them beside one head or more.
    assert shape.ratio(host) == pytest.approx(ratio, rel=0.03)
    assert shape.ratio(host) >= 1


@settings(deadline=None)
@given(ratios=st.tuples(st.floats(1, 20), st.floats(1, 20)))
def test_a_larger_ratio_never_keeps_more_parameters(ratios: tuple[float, float]) -> None:
    small, large = (shape_for_ratio(BERT_BASE, ratio).ratio(BERT_BASE) for ratio in sorted(ratios))
    assert large >= small * (1 - 0.02)  # up to the steps in which neurons are kept


def test_the_smallest_model_and_beyond() -> None:
    most = SlenderShape.uniform(3, 1, 1).ratio(TINY)
    assert uniform(shape_for_ratio(TINY, most))[:2] == (1, 1)
    for ratio in (most * 1.01, 1e9):
        with pytest.raises(
            InputError, match=r"ratio: got .*, expected at most .* for this model; one head and one neu"
        ):
            shape_for_ratio(TINY, ratio)


@pytest.mark.parametrize("ratio", [0.5, 0, -1, float("nan"), float("inf")])
def test_no_ratio(ratio: float) -> None:
    with pytest.raises(InputError, match="ratio: got .*, expected a number of at least 1"):
        shape_for_ratio(BERT_BASE, ratio)


def test_shape_documents() -> None:
    for shape in (SlenderShape((2, 1), (5, 9), 7), SlenderShape((2,), (5,))):
        assert SlenderShape.from_document(shape.document(), "test") == shape
    assert SlenderShape((2, 1), (5, 9), 7).document() == {"heads": [2, 1], "neurons": [5, 9], "embedding": 7}
    assert str(SlenderShape((2, 1), (5, 9), 7)) == "a1-2_l2_f5-9_e7"


@pytest.mark.parametrize(
    "document",
    [
        None,
        {},
        {"heads": [1], "neurons": [1]},
        {"heads": [1], "neurons": [1, 2], "embedding": None},
        {"heads": [], "neurons": [], "embedding": None},
        {"heads": [0], "neurons": [1], "embedding": None},
        {"heads": [1.5], "neurons": [1], "embedding": None},
        {"heads": [True], "neurons": [1], "embedding": None},
        {"heads": ["x"], "neurons": [1], "embedding": None},
        {"heads": 3, "neurons": [1], "embedding": None},
        {"heads": [1], "neurons": [1], "embedding": -1},
    ],
)
def test_no_shape_document(document: Any) -> None:
    with pytest.raises(InputError, match=r"compexport.json: no widths: .*expected .*heads"):
        SlenderShape.from_document(document, "compexport.json")


# --- hosts


def test_facts_of_every_host() -> None:
    sizes = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 50}
    bert = HostFacts.of(BertConfig(**sizes, layer_norm_eps=1e-5, classifier_dropout=0.3))
    assert (bert.layers, bert.hidden, bert.heads, bert.head_width, bert.neurons) == (3, 24, 3, 8, 50)
    assert (bert.norm_epsilon, bert.dropout, bert.classifier_dropout) == (1e-5, 0.1, 0.3)
    assert (bert.position_start, bert.pooler_activation, bert.types) == (None, "tanh", 2)
    roberta = HostFacts.of(RobertaConfig(**sizes, pad_token_id=1))
    assert (roberta.position_start, roberta.pooler_activation) == (1, "tanh")
    electra = HostFacts.of(ElectraConfig(**sizes, embedding_size=16))
    assert (electra.word_width, electra.hidden, electra.pooler_activation) == (16, 24, "gelu")
    distil = HostFacts.of(DistilBertConfig(dim=24, n_layers=3, n_heads=3, hidden_dim=50, dropout=0.2))
    assert (distil.layers, distil.hidden, distil.heads, distil.neurons, distil.types) == (3, 24, 3, 50, 0)
    assert (distil.dropout, distil.classifier_dropout, distil.pooler_activation) == (0.2, 0.2, "relu")


def test_hosts_it_does_not_fit() -> None:
    with pytest.raises(InputError, match="COST-EFF does not fit this architecture: got 'bart', expected one of bert, "):
        HostFacts.of(BartConfig())
    with pytest.raises(InputError, match="does not fit these positions: got relative_key, expected absolute"):
        HostFacts.of(SimpleNamespace(model_type="bert", position_embedding_type="relative_key"))


# --- weights


@pytest.mark.parametrize("rank", [1, 5, 20])
def test_factorising_is_the_truncated_singular_value_decomposition(rank: int) -> None:
    table = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 2, 20)
    left, right = factorised(table, rank)
    assert (left.shape, right.shape) == ((60, rank), (20, rank))
    u, s, v = torch.linalg.svd(table.double(), full_matrices=False)
    best = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close((left @ right.T).double(), best, atol=1e-5, rtol=0)
    torch.testing.assert_close(right.T @ right, torch.eye(rank), atol=1e-5, rtol=0)
    torch.testing.assert_close(left.norm(dim=0), s[:rank].float(), atol=1e-4, rtol=0)


def test_factorising_a_table_of_low_rank_loses_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(60, 3, generator=generator) @ torch.randn(3, 20, generator=generator)
    left, right = factorised(table, 3)
    torch.testing.assert_close(left @ right.T, table, atol=1e-5, rtol=0)


def test_keeping_everything_is_the_identity(backbone: Callable[..., Backbone]) -> None:
    loaded = backbone("tiny-bert-deep", "sequence-classification")
    tensors = official_names(loaded, 2)
    same = slenderised(tensors, 8, [range(4)] * 4, [range(64)] * 4, None)
    assert same.keys() == tensors.keys()
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())


def test_heads_and_neurons_are_taken_in_the_order_given(backbone: Callable[..., Backbone]) -> None:
    tensors = official_names(backbone("tiny-bert-deep", "sequence-classification"), 2)
    heads, neurons = [[3, 1], [0], [2, 0, 1], [3]], [[9, 3], [5], [63, 0], [1, 2]]
    kept = slenderised(tensors, 8, heads, neurons, 6)
    prefix = "bert.encoder.layer.0."
    query, output = f"{prefix}attention.self.query", f"{prefix}attention.output.dense.weight"
    rows = [*range(24, 32), *range(8, 16)]
    assert torch.equal(kept[f"{query}.weight"], tensors[f"{query}.weight"][rows])
    assert torch.equal(kept[f"{query}.bias"], tensors[f"{query}.bias"][rows])
    assert torch.equal(kept[output], tensors[output][:, rows])
    assert torch.equal(kept[f"{prefix}intermediate.dense.bias"], tensors[f"{prefix}intermediate.dense.bias"][[9, 3]])
    assert torch.equal(kept[f"{prefix}output.dense.weight"], tensors[f"{prefix}output.dense.weight"][:, [9, 3]])
    assert [kept[f"bert.encoder.layer.{i}.attention.self.key.weight"].shape[0] for i in range(4)] == [16, 8, 24, 8]
    assert WORDS not in kept and kept[WORDS_LEFT].shape[1] == kept[WORDS_RIGHT].shape[1] == 6
    # A factorised table is factorised again as the product it stands for.
    again = slenderised(kept, 8, [range(len(x)) for x in heads], [range(len(x)) for x in neurons], 4)
    once = slenderised(tensors, 8, heads, neurons, 4)
    torch.testing.assert_close(
        again[WORDS_LEFT] @ again[WORDS_RIGHT].T, once[WORDS_LEFT] @ once[WORDS_RIGHT].T, atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("name", ["tiny-bert", "tiny-roberta", "tiny-electra", "tiny-distilbert"])
def test_official_names_leave_nothing_out(backbone: Callable[..., Backbone], name: str) -> None:
    loaded = backbone(name, "sequence-classification")
    tensors = official_names(loaded, 2)
    assert sum(t.numel() for t in tensors.values()) == loaded.params
    assert all(name.startswith(("bert.", "classifier.")) for name in tensors)
    assert "bert.encoder.layer.1.attention.self.query.weight" in tensors
    headless = official_names(loaded, 3)
    assert {*tensors} - {*headless} == {
        *(f"bert.pooler.dense.{part}" for part in ("weight", "bias")),
        *(f"classifier.{part}" for part in ("weight", "bias")),
    }
    bare = official_names(backbone(name), 2)
    assert bare.keys() == headless.keys()
