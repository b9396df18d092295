"""Variator's acceptance properties, which need no trained weights, and what a stored plugin must look like."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from compexport.errors import InputError
from exporter.backbone import Backbone
from exporter.hosts import HOSTS
from exporter.methods import variator
from exporter.methods.variator import LayerPlugin, VariatorEncoder, VariatorModel, VariatorPlugins, default_width
from tests import models
from tests.exporter.conftest import random_plugins
from tests.models import HIDDEN, LAYERS

PADS = ("masked", "official")
every_pad = pytest.mark.parametrize("pad", PADS)
# One host of each kind: post-norm, pre-norm with a position bias, pre-norm with learnt positions.
every_kind = pytest.mark.parametrize("name", ["tiny-bert", "tiny-t5", "tiny-mbart"])


def _feed(backbone: Backbone, real: list[int], length: int, *, pad_id: int = 0, seed: int = 0) -> dict[str, Tensor]:
    """Random ids, right-padded to ``length``: equal seeds give equal tokens whatever the padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, backbone.config.vocab_size, (len(real), 64), generator=generator)
    mask = (torch.arange(length) < torch.tensor(real)[:, None]).long()
    ids = torch.where(mask == 1, tokens[:, :length], pad_id)
    return {"input_ids": ids, "attention_mask": mask}


def _hidden(encoder: VariatorEncoder, feed: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return encoder(**feed).last_hidden_state


def _layer(pad: str, ratio: int, seed: int = 0) -> LayerPlugin:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        plugin = LayerPlugin(HIDDEN, ratio, 5, pad)  # type: ignore[arg-type]
        for parameter in plugin.parameters():
            nn.init.normal_(parameter, std=0.3)
    return plugin.requires_grad_(False)


def _silence(plugin: nn.Module) -> None:
    """Make the corrections zero."""
    for name, parameter in plugin.named_parameters():
        if "demux_adapter.w_out" in name:
            nn.init.zeros_(parameter)


# --- 1g, 1 to 8 and 10 --------------------------------------------------------------------------------------------


@every_kind
@every_pad
def test_without_plugins_it_is_the_backbone_and_attaching_leaves_no_trace(
    pad: str, name: str, backbone: Callable[..., Backbone]
) -> None:
    bert = backbone(name)
    feed = _feed(bert, [9, 4], 9)
    with torch.no_grad():
        expected = bert.encoder(**feed).last_hidden_state
    encoder = VariatorEncoder(bert)
    assert torch.equal(_hidden(encoder, feed), expected)
    encoder.attach(random_plugins(bert, 4, pad))
    assert (_hidden(encoder, feed) - expected).abs().max() > 0.1
    encoder.detach()
    assert torch.equal(_hidden(encoder, feed), expected)


@every_kind
@every_pad
def test_ratio_one_without_correction_is_the_backbone(pad: str, name: str, backbone: Callable[..., Backbone]) -> None:
    bert = backbone(name)
    feed = _feed(bert, [9, 4], 9)
    encoder = VariatorEncoder(bert)
    expected = _hidden(encoder, feed)
    plugins = random_plugins(bert, 1, pad)
    _silence(plugins)
    encoder.attach(plugins)
    real = feed["attention_mask"] == 1
    assert torch.equal(_hidden(encoder, feed)[real], expected[real])


@every_pad
def test_ratio_one_merges_to_the_same_tokens(pad: str) -> None:
    x = torch.randn(2, 7, HIDDEN)
    assert torch.equal(_layer(pad, 1).merge(x, torch.ones(2, 7)), x)


@every_pad
@pytest.mark.parametrize("ratio", [2, 4])
def test_equal_tokens_in_a_group_pass_through_unchanged(
    pad: str, ratio: int, backbone: Callable[..., Backbone]
) -> None:
    bert = backbone()
    plugin = _layer(pad, ratio)
    _silence(plugin)
    x = torch.randn(2, 3, HIDDEN).repeat_interleave(ratio, dim=1)
    layer, host = bert.layers[0], bert.host
    with torch.no_grad():
        y = host.feed_forward(layer, plugin.merge(x, torch.ones(x.shape[:2])))
        torch.testing.assert_close(plugin.split(y, x), host.feed_forward(layer, x), atol=1e-5, rtol=1e-5)


@every_pad
def test_zero_mixer_takes_the_mean(pad: str) -> None:
    plugin = _layer(pad, 4)
    nn.init.zeros_(plugin.mux_layer.weight)
    nn.init.zeros_(plugin.mux_layer.bias)
    x = torch.randn(2, 8, HIDDEN)
    expected = x.view(2, 2, 4, HIDDEN).mean(2)
    torch.testing.assert_close(plugin.merge(x, torch.ones(2, 8)), expected)


def test_zero_mixer_takes_the_mean_of_real_tokens() -> None:
    plugin = _layer("masked", 4)
    nn.init.zeros_(plugin.mux_layer.weight)
    nn.init.zeros_(plugin.mux_layer.bias)
    x = torch.randn(1, 6, HIDDEN)
    mask = torch.tensor([[1.0, 1, 1, 1, 1, 0]])
    torch.testing.assert_close(plugin.merge(x, mask), torch.stack([x[:, :4].mean(1), x[:, 4]], 1))


@every_pad
@pytest.mark.parametrize("slot", [0, 2])
def test_a_large_bias_selects_its_slot(pad: str, slot: int) -> None:
    plugin = _layer(pad, 3)
    nn.init.zeros_(plugin.mux_layer.weight)
    nn.init.zeros_(plugin.mux_layer.bias)
    plugin.mux_layer.bias[slot] = 1e4
    x = torch.randn(2, 9, HIDDEN)
    assert torch.equal(plugin.merge(x, torch.ones(2, 9)), x[:, slot::3])


@every_pad
@pytest.mark.parametrize("token", [0, 5, 9])
def test_a_token_touches_its_own_group_only(pad: str, token: int) -> None:
    ratio = 4
    plugin = _layer(pad, ratio)
    x = torch.randn(1, 10, HIDDEN)
    changed = x.clone()
    changed[0, token] += 1.0
    mask = torch.ones(1, 10)
    before, after = plugin.merge(x, mask), plugin.merge(changed, mask)
    moved = (before != after).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [token // ratio]
    # The splitter sees the token itself and its group's vector, nothing else.
    out, other = plugin.split(before, x), plugin.split(after, changed)
    moved = (out != other).any(-1)[0].nonzero().flatten().tolist()
    assert moved == [t for t in range(10) if t // ratio == token // ratio]


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("n_real", [1, 5, 8, 13])
@every_kind
def test_masked_ignores_padding(name: str, n_real: int, ratio: int, backbone: Callable[..., Backbone]) -> None:
    bert = backbone(name)
    encoder = VariatorEncoder(bert)
    encoder.attach(random_plugins(bert, ratio, "masked"))
    expected = _hidden(encoder, _feed(bert, [n_real], n_real))
    for length in (n_real, n_real + 1, n_real + ratio, 32):
        for pad_id in (0, 7):
            got = _hidden(encoder, _feed(bert, [n_real], length, pad_id=pad_id))[:, :n_real]
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("ratio", [2, 4, 8])
@pytest.mark.parametrize("n_real", [1, 5, 8, 13])
@every_kind
def test_official_ignores_the_amount_of_padding_only(
    name: str, n_real: int, ratio: int, backbone: Callable[..., Backbone]
) -> None:
    bert = backbone(name)
    encoder = VariatorEncoder(bert)
    encoder.attach(random_plugins(bert, ratio, "official"))
    covering = -(-n_real // ratio) * ratio
    expected = _hidden(encoder, _feed(bert, [n_real], covering))[:, :n_real]
    for length in (covering + ratio, 32):
        got = _hidden(encoder, _feed(bert, [n_real], length))[:, :n_real]
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)
    other = _hidden(encoder, _feed(bert, [n_real], covering, pad_id=7))[:, :n_real]
    difference = (other - expected).abs().max()
    assert difference < 1e-5 if n_real % ratio == 0 else difference > 1e-3


@pytest.mark.parametrize(
    ("hidden", "layers", "per_layer", "tensors"), [(768, 12, 160_580, 72), (1024, 24, 214_084, 144)]
)
def test_parameter_counts_are_the_published_ones(hidden: int, layers: int, per_layer: int, tensors: int) -> None:
    with torch.device("meta"):
        plugins = VariatorPlugins(hidden, layers, 4, 64)
    assert plugins.params == layers * per_layer
    assert len(plugins.state_dict()) == tensors


@every_pad
def test_training_touches_plugins_only(pad: str, backbone: Callable[..., Backbone]) -> None:
    bert = backbone()
    before = _checksum(bert.model)
    encoder = VariatorEncoder(bert)
    plugins = random_plugins(bert, 4, pad).train()
    encoder.attach(plugins)
    old = {name: tensor.clone() for name, tensor in plugins.state_dict().items()}
    optimiser = torch.optim.SGD([p for p in encoder.parameters() if p.requires_grad], lr=1.0)
    feed = _feed(bert, [9, 6], 9)
    target = torch.randn(2, 9, HIDDEN, generator=torch.Generator().manual_seed(0))
    (encoder(**feed).last_hidden_state - target).square().mean().backward()
    optimiser.step()
    assert _checksum(bert.model) == before
    assert all(parameter.grad is None for parameter in bert.model.parameters())
    unmoved = [name for name, tensor in plugins.state_dict().items() if torch.equal(tensor, old[name])]
    assert unmoved == []


def _checksum(module: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def test_attach_refuses_another_number_of_layers(backbone: Callable[..., Backbone]) -> None:
    encoder = VariatorEncoder(backbone())
    with pytest.raises(InputError, match=f"got 3 layers, expected {LAYERS}"):
        encoder.attach(VariatorPlugins(HIDDEN, 3, 2, 4))


@every_kind
def test_hidden_states_are_embeddings_and_every_layer(name: str, backbone: Callable[..., Backbone]) -> None:
    bert = backbone(name)
    feed = _feed(bert, [9, 4], 9)
    with torch.no_grad():
        expected = bert.encoder(**feed, output_hidden_states=True).hidden_states
        got = VariatorEncoder(bert)(**feed, keep_states=True)
    assert len(got.hidden_states) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(got.hidden_states, expected, strict=True))
    assert VariatorEncoder(bert)(**feed).hidden_states == ()


@pytest.mark.parametrize(("buckets", "farthest"), [(16, 40), (32, 128), (8, 8)])
@pytest.mark.parametrize("length", [1, 2, 39, 200])
def test_position_bias_is_that_of_t5(buckets: int, farthest: int, length: int) -> None:
    """Also far beyond the distance from which all distances share a row of the table."""
    sizes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": farthest, "vocab_size": 8}
    config = transformers.T5Config(**{**models.MODELS["tiny-t5"].config, **sizes})
    encoder, host = transformers.T5EncoderModel(config).encoder.requires_grad_(False), HOSTS["t5"]
    mask = torch.randn(3, 1, 1, length)
    got = host.attention_bias(encoder, mask, host.position_buckets(encoder))
    expected = encoder.block[0].layer[0].SelfAttention.compute_bias(length, length) + mask
    assert got.shape == (3, config.num_heads, length, length)
    assert torch.equal(got, expected)


@pytest.mark.parametrize(("name", "skips"), [("tiny-t5", True), ("tiny-t5-gated", True), ("tiny-bert", False)])
@every_pad
def test_padded_rows_skip_attention_where_plugins_were_published(
    name: str, skips: bool, pad: str, backbone: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = backbone(name)
    encoder = VariatorEncoder(loaded)
    encoder.attach(random_plugins(loaded, 4, pad))
    feed = _feed(loaded, [6], 8)
    read: list[Tensor] = []
    monkeypatch.setattr(LayerPlugin, "split", lambda self, y, x: read.append(x) or x)
    with torch.no_grad():
        h = encoder.embed(feed["input_ids"])
        encoder(**feed)
        entered = loaded.host.enter(loaded.layers[0], h)
    same = (read[0] == entered).all(-1)[0].tolist()
    assert same == [False] * 6 + [skips and pad == "official"] * 2


# --- stored tensors -----------------------------------------------------------------------------------------------


def _tensors(ratio: int = 4, width: int = 6) -> dict[str, Tensor]:
    return dict(VariatorPlugins(HIDDEN, LAYERS, ratio, width).state_dict())


def _load(tensors: dict[str, Tensor], pad: Any = "masked") -> VariatorPlugins:
    return VariatorPlugins.from_tensors(tensors, HIDDEN, LAYERS, pad, "plugins.safetensors")


@every_pad
def test_stored_tensors_come_back(pad: str) -> None:
    tensors = _tensors()
    plugins = _load(tensors, pad)
    assert (plugins.ratio, plugins.width, plugins.pad) == (4, 6, pad)
    assert {name: tensor.tolist() for name, tensor in plugins.state_dict().items()} == {
        name: tensor.tolist() for name, tensor in tensors.items()
    }


def test_half_precision_tensors_become_fp32() -> None:
    plugins = _load({name: tensor.half() for name, tensor in _tensors().items()})
    assert {parameter.dtype for parameter in plugins.parameters()} == {torch.float32}


FIRST = "mux_layer.0.mux_layer."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({FIRST + "bias": torch.zeros(3)}, rf"{FIRST}weight: got \(4, 128\), expected \(3, 96\)"),
        ({FIRST + "weight": torch.zeros(4, 64)}, rf"{FIRST}weight: got \(4, 64\), expected \(4, 128\)"),
        ({"mux_layer.1.mux_layer.bias": torch.zeros(2)}, r"mux_layer.1.mux_layer.bias: got \(2,\), expected \(4,\)"),
        ({"mux_layer.1.demux_adapter.w_out.bias": None}, r"w_out.bias: got nothing, expected \(32,\)"),
        ({"mux_layer.2.mux_layer.bias": torch.zeros(4)}, r"mux_layer.2.mux_layer.bias: got \(4,\), expected no such"),
        ({"project_q_lora.0.lora_A": torch.zeros(1)}, r"project_q_lora.0.lora_A: got \(1,\), expected no such tensor"),
        ({FIRST + "bias": None}, "no Variator plugins"),
    ],
    ids=["k of the weight", "k of the bias", "k of another layer", "missing", "a layer too many", "extra", "no k"],
)
def test_unexpected_tensors_are_refused(change: dict[str, Tensor | None], message: str) -> None:
    tensors: dict[str, Any] = {**_tensors(), **change}
    with pytest.raises(InputError, match=f"^plugins.safetensors: .*{message}"):
        _load({name: tensor for name, tensor in tensors.items() if tensor is not None})


@pytest.mark.parametrize("bias", [torch.zeros(0), torch.tensor(1.0)], ids=["k = 0", "no axis"])
def test_a_meaningless_k_is_refused(bias: Tensor) -> None:
    with pytest.raises(InputError):
        _load({**_tensors(), FIRST + "bias": bias})


# --- width and cost -----------------------------------------------------------------------------------------------


def _without_weights(config: Any) -> Backbone:
    """A backbone of any size, on the meta device: shapes and no numbers."""
    with torch.device("meta"):
        model = transformers.BertModel(config)
    return Backbone(
        folder=Path("meta"),
        model=model,
        host=HOSTS["bert"],
        task="feature-extraction",
        labels=[],
        pooling=None,
        max_length=512,
        input_names=("input_ids", "attention_mask", "token_type_ids"),
        config=config,
    )


BASE = {}
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


@pytest.mark.parametrize("sizes", [BASE, MINILM], ids=["bert-base", "minilm"])
@pytest.mark.parametrize("ratio", [2, 4, 8])
def test_default_width_is_the_largest_within_one_percent(sizes: dict[str, int], ratio: int) -> None:
    backbone = _without_weights(transformers.BertConfig(**sizes))
    hidden, layers, total = backbone.hidden_size, backbone.num_layers, backbone.params
    assert total > 20_000_000
    width = default_width(backbone, ratio)
    assert 4 <= width <= 64
    with torch.device("meta"):
        extra = [VariatorPlugins(hidden, layers, ratio, w).params for w in (width, width + 1)]
    assert extra[0] <= 0.01 * total
    assert width == 64 or extra[1] > 0.01 * total


@pytest.mark.parametrize(
    ("name", "task"),
    [
        (name, task)
        for name, tiny in models.MODELS.items()
        for task in tiny.classes
        if task != "token-classification"  # as question-answering
    ],
)
@pytest.mark.parametrize("ratio", [1, 2, 4, 8])
def test_cost_is_what_pytorch_counts(name: str, task: str, ratio: int, backbone: Callable[..., Backbone]) -> None:
    loaded = backbone(name, task)
    plugins = None if ratio == 1 else random_plugins(loaded, ratio, "masked", width=5)
    model = VariatorModel(loaded).eval()
    if plugins is not None:
        model.variator.attach(plugins)
    for length in (16, 48):
        feed = _feed(loaded, [length], length, pad_id=1)
        # Products only: the weighted sum of a group and the attention are products of matrices here too.
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(**feed)
        assert variator.cost(loaded, plugins).macs(length) == counter.get_total_flops() // 2
