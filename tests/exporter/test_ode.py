"""Stepping through shared layers: the properties that need no trained weights (methods.md 4g)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from compexport.errors import InputError
from engines.manifest import Cost
from exporter.backbone import Backbone, load_backbone
from exporter.methods.ode import (
    FORMS,
    SteppedCache,
    SteppedEncoder,
    SteppedModel,
    Stepping,
    cost,
    facts_of,
    output_names,
    ratios_that_work,
    stepping_for_ratio,
)
from exporter.methods.slender import HostFacts
from exporter.methods.variator import VariatorModel
from tests import models

ENCODERS = ["tiny-albert", "tiny-albert-groups"]


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Path]) -> Callable[..., Backbone]:
    """``loaded("tiny-albert", "question-answering")``, its norms no longer those of a fresh model."""
    made: dict[tuple[str, str], Backbone] = {}

    def get(name: str = "tiny-albert", task: str = "feature-extraction") -> Backbone:
        if (name, task) not in made:
            made[name, task] = load_backbone(tiny(name, task))
            trained_norms(made[name, task].model)
        return made[name, task]

    return get


def trained_norms(model: torch.nn.Module, seed: int = 0) -> None:
    """Gains of 1 ± 0.3 and biases of ± 0.2: with those of a fresh model, every form looks consistent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.add_(0.3 * torch.randn(module.weight.shape, generator=generator))
                module.bias.add_(0.2 * torch.randn(module.bias.shape, generator=generator))


def feed_of(
    backbone: Backbone, batch: int = 3, length: int = 9, pad: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Random ids [B,S]; every row is padded to another length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, backbone.config.vocab_size, (batch, length), generator=generator)
    real = torch.arange(length)[None] < torch.tensor([length - 2 * row for row in range(batch)])[:, None]
    mask = (real.flip(1) if pad == "left" else real).long()
    feed = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in backbone.input_names:
        feed["token_type_ids"] = (torch.arange(length) > 4).long().expand(batch, length).contiguous()
    return feed


def hugging_face(backbone: Backbone, feed: dict[str, Tensor], **switches: Any) -> tuple[Tensor, ...]:
    """What transformers makes of it."""
    with torch.no_grad():
        found: Any = backbone.model(**feed, **switches)
    names = [name for name in output_names(backbone) if name != "sentence_embedding"]
    return tuple(found[name] for name in names)


# --- property 1 and 2 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", models.HEAD_CLASSES)
@pytest.mark.parametrize("name", ENCODERS)
def test_steps_of_1_are_the_original_bit_by_bit(
    name: str, task: str, form: Any, loaded: Callable[..., Backbone]
) -> None:
    backbone = loaded(name, task)
    feed = feed_of(backbone)
    model = SteppedModel(backbone)
    listed = Stepping(form, tuple((1.0,) * count for count in model.facts.groups))
    for stepping in (Stepping.full(model.facts.groups, form), stepping_for_ratio(model.facts, 1, form), listed):
        with torch.no_grad():
            got = SteppedModel(backbone, stepping)(**feed)
        for ours, theirs in zip(got, hugging_face(backbone, feed), strict=False):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("form", FORMS)
def test_a_decoder_of_steps_of_1_is_the_original_bit_by_bit(
    form: Any, pad: str, loaded: Callable[..., Backbone]
) -> None:
    backbone = loaded("tiny-gpt2-shared", "text-generation")
    feed = feed_of(backbone, pad=pad)
    stepping = Stepping.full((6,), form)
    with torch.no_grad():
        (logits,) = SteppedModel(backbone, stepping)(**feed)
        cached, cache = SteppedModel(backbone, stepping).decode(**feed)
    # With a cache, keys lie in memory in another order, and so are their sums added up.
    assert torch.equal(logits, *hugging_face(backbone, feed, use_cache=False))
    assert torch.equal(cached, *hugging_face(backbone, feed, use_cache=True))
    assert (len(cache.pairs), cache.length) == (6, 9)


# --- property 3 to 6: the arithmetic of a step -----------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6])
def test_a_decoder_that_adds_nothing_returns_its_input(
    form: Any, n: int, tiny: Callable[..., Path], loaded: Callable[..., Backbone]
) -> None:
    backbone = load_backbone(tiny("tiny-gpt2-shared", "text-generation"))
    block: Any = backbone.layers[0]
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        projection.weight.data.zero_()
        projection.bias.data.zero_()
    encoder = SteppedEncoder(backbone.model)
    with torch.no_grad():
        states = encoder(**feed_of(backbone), stepping=Stepping.even((6,), (n,), form), keep_states=True).hidden_states
    assert len(states) == n + 1
    for state in states[1:]:
        torch.testing.assert_close(state, states[0])


def test_a_linear_field_gives_the_power_of_its_step(
    loaded: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = SteppedEncoder(loaded().model)
    generator = torch.Generator().manual_seed(0)
    field = 0.1 * torch.randn(models.HIDDEN, models.HIDDEN, generator=generator, dtype=torch.float64)
    monkeypatch.setattr(encoder, "_iteration", lambda h, *_: h + h @ field.T)
    start = torch.randn(2, 3, models.HIDDEN, generator=generator, dtype=torch.float64)
    for n in (1, 2, 3, 4, 6, 12):
        dt, h = 6 / n, start
        for _ in range(n):
            h = encoder.step(h, torch.zeros(1), 0, dt, "block")
        power = torch.linalg.matrix_power(torch.eye(models.HIDDEN, dtype=torch.float64) + dt * field, n)
        torch.testing.assert_close(h, start @ power.T)


def test_the_block_form_converges(tiny: Callable[..., Path]) -> None:
    """Against a very fine run the error falls with every doubling of n, by a factor that nears a half."""
    backbone = load_backbone(tiny("tiny-albert"))
    trained_norms(backbone.model)
    encoder = SteppedEncoder(backbone.model.double())
    feed = feed_of(backbone)

    def final(n: int) -> Tensor:
        with torch.no_grad():
            return encoder(**feed, stepping=Stepping.even((6,), (n,), "block")).last_hidden_state

    fine = final(6 * 128)
    errors = [float((final(6 * factor) - fine).norm()) for factor in (1, 2, 4, 8)]
    ratios = [after / before for before, after in pairwise(errors)]
    assert all(0.4 < ratio < 0.8 for ratio in ratios)
    assert abs(ratios[-1] - 0.5) < abs(ratios[0] - 0.5)


def sublayers_of_albert(layer: Any, h: Tensor, bias: Tensor, dt: float) -> Tensor:
    """The post-norm sublayer form, from what goes into the host's own norms."""
    entered: list[Tensor] = []
    norms = (layer.attention.LayerNorm, layer.full_layer_layer_norm)
    hooks = [norm.register_forward_pre_hook(lambda _, args: entered.append(args[0])) for norm in norms]
    layer.attention(h, bias)
    middle = norms[0](h + dt * (entered[0] - h))
    entered.clear()
    fed = layer.ff_chunk(middle)
    for hook in hooks:
        hook.remove()
    out: Tensor = norms[1](middle + dt * fed)
    return out


@pytest.mark.parametrize("dt", [0.5, 1.5, 2.0])
def test_a_step_in_either_form(dt: float, loaded: Callable[..., Backbone]) -> None:
    backbone = loaded("tiny-albert-groups")
    encoder, layers = SteppedEncoder(backbone.model), backbone.layers
    feed = feed_of(backbone)
    with torch.no_grad():
        h = encoder.embed(feed["input_ids"], feed["token_type_ids"])
        bias = encoder.attention_bias(feed["attention_mask"], h)
        whole: Any = backbone.model.encoder.albert_layer_groups[1]  # type: ignore[union-attr, index]
        torch.testing.assert_close(encoder.step(h, bias, 1, dt, "block"), (1 - dt) * h + dt * whole(h, bias))
        expected = sublayers_of_albert(layers[3], sublayers_of_albert(layers[2], h, bias, dt), bias, dt)
        torch.testing.assert_close(encoder.step(h, bias, 1, dt, "sublayer"), expected)


@pytest.mark.parametrize("dt", [0.5, 2.0])
def test_a_step_of_a_decoder_in_either_form(dt: float, loaded: Callable[..., Backbone]) -> None:
    backbone = loaded("tiny-gpt2-shared", "text-generation")
    encoder, block, feed = SteppedEncoder(backbone.model), backbone.layers[2], feed_of(backbone)
    layer: Any = block
    with torch.no_grad():
        h = encoder.embed(feed["input_ids"])
        bias = encoder.attention_bias(feed["attention_mask"], h)
        torch.testing.assert_close(encoder.step(h, bias, 0, dt, "block"), (1 - dt) * h + dt * layer(h, None, bias))
        middle = h + dt * layer.attn(layer.ln_1(h), attention_mask=bias)[0]
        expected = middle + dt * layer.mlp(layer.ln_2(middle))
        torch.testing.assert_close(encoder.step(h, bias, 0, dt, "sublayer"), expected)


@pytest.mark.parametrize("form", FORMS)
def test_a_size_may_be_a_tensor(form: Any, loaded: Callable[..., Backbone]) -> None:
    backbone = loaded()
    encoder, feed = SteppedEncoder(backbone.model), feed_of(backbone)
    with torch.no_grad():
        h = encoder.embed(feed["input_ids"])
        bias = encoder.attention_bias(feed["attention_mask"], h)
        for dt in (1.0, 2.0, 1.2):
            got = encoder.step(h, bias, 0, torch.tensor([dt]), form)
            torch.testing.assert_close(got, encoder.step(h, bias, 0, dt, form))


def test_the_combination_is_made_in_fp32(loaded: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = SteppedEncoder(loaded().model)
    generator = torch.Generator().manual_seed(0)
    h, iterated = (torch.randn(2, 3, models.HIDDEN, generator=generator).bfloat16() for _ in range(2))
    monkeypatch.setattr(encoder, "_iteration", lambda *_: iterated)
    expected = (-2 * h.float() + 3 * iterated.float()).bfloat16()
    assert torch.equal(encoder.step(h, torch.zeros(1), 0, 3.0, "block"), expected)
    assert not torch.equal(-2 * h + 3 * iterated, expected)


def test_steps_stay_in_their_group(loaded: Callable[..., Backbone], monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = loaded("tiny-albert-groups")
    encoder, taken = SteppedEncoder(backbone.model), []
    assert encoder.facts.groups == (2, 2)
    step = encoder.step
    monkeypatch.setattr(encoder, "step", lambda h, bias, *rest: taken.append(rest[:2]) or step(h, bias, *rest))
    with torch.no_grad():
        encoder(**feed_of(backbone), stepping=Stepping("block", ((2.0,), (0.5, 1.5))))
    assert taken == [(0, 2.0), (1, 0.5), (1, 1.5)]
    with pytest.raises(InputError, match="sum of the steps of group 1: got 3 .1, 2., expected 2"):
        encoder(**feed_of(backbone), stepping=Stepping("block", ((1.0, 2.0), (1.0,))))


@pytest.mark.parametrize("name", ["tiny-albert", "tiny-gpt2-shared"])
def test_a_layer_is_made_of_the_parts_that_its_host_names(name: str, loaded: Callable[..., Backbone]) -> None:
    backbone = loaded(name, "text-generation" if "gpt2" in name else "feature-extraction")
    host, layer, feed = backbone.host, backbone.layers[0], feed_of(backbone)
    encoder = SteppedEncoder(backbone.model)
    with torch.no_grad():
        h = host.embed(backbone.encoder, feed["input_ids"], None)
        bias = encoder.attention_bias(feed["attention_mask"], h)
        attended = host.attend(layer, h, bias)
        got = host.finish(layer, attended + host.feed_forward(layer, host.enter(layer, attended)))
        assert torch.equal(got, encoder.step(h, bias, 0, 1.0))


def test_fast_attention_is_the_same_one(tiny: Callable[..., Path]) -> None:
    for name, task in (("tiny-albert", "feature-extraction"), ("tiny-gpt2-shared", "text-generation")):
        eager, fast = (load_backbone(tiny(name, task), attention=kind) for kind in ("eager", "sdpa"))
        feed = feed_of(eager)
        real = feed["attention_mask"].bool()
        stepping = stepping_for_ratio((6,), 2)
        with torch.no_grad():
            states = [SteppedModel(one, stepping)(**feed)[0][real] for one in (eager, fast)]
        torch.testing.assert_close(*states, atol=1e-5, rtol=1e-4)


# --- property 7 to 9 -------------------------------------------------------------------------------------------------


def test_weights_do_not_depend_on_the_steps(loaded: Callable[..., Backbone]) -> None:
    backbone = loaded("tiny-gpt2-shared", "text-generation")
    made = [SteppedModel(backbone, stepping_for_ratio((6,), ratio)) for ratio in (1, 2, 6)]
    assert len({sum(one.numel() for one in model.parameters()) for model in made} | {backbone.params}) == 1
    own = {id(one) for one in backbone.model.parameters()}
    assert all(id(one) in own for model in made for one in model.parameters())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [1, 2, 6])
@pytest.mark.parametrize("name", ["tiny-albert", "tiny-gpt2-shared"])
def test_pad_ids_never_change_real_positions(
    name: str, ratio: float, form: Any, loaded: Callable[..., Backbone]
) -> None:
    backbone = loaded(name, "text-generation" if "gpt2" in name else "feature-extraction")
    model = SteppedModel(backbone, stepping_for_ratio((6,), ratio, form))
    feed = feed_of(backbone)
    real = feed["attention_mask"].bool()
    other = {**feed, "input_ids": feed["input_ids"].where(real, 7)}
    with torch.no_grad():
        assert torch.equal(model(**feed)[0][real], model(**other)[0][real])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ratio", [1, 1.5, 2, 3, 6])
def test_decoding_with_a_cache_is_decoding(ratio: float, form: Any, loaded: Callable[..., Backbone]) -> None:
    """Token by token and in pieces, with padding on the left as generation has it."""
    backbone = loaded("tiny-gpt2-shared", "text-generation")
    model = SteppedModel(backbone, stepping_for_ratio((6,), ratio, form))
    feed = feed_of(backbone, pad="left")
    ids, mask = feed["input_ids"], feed["attention_mask"]
    places = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    with torch.no_grad():
        (whole,) = model(ids, mask, None, places)
        parts, past = [], None
        for start, end in pairwise([0, 4, 5, 6, 9]):
            logits, past = model.decode(ids[:, start:end], mask[:, :end], places[:, start:end], past)
            parts.append(logits)
            assert (past.length, len(past.pairs)) == (end, model.stepping.n)
        torch.testing.assert_close(torch.cat(parts, dim=1)[real], whole[real], atol=1e-5, rtol=1e-4)
        empty = SteppedCache(model.stepping, tuple((key[:, :, :0], value[:, :, :0]) for key, value in past.pairs))
        torch.testing.assert_close(model.decode(ids, mask, places, empty)[0][real], whole[real], atol=1e-5, rtol=1e-4)


def test_greedy_tokens_are_those_of_transformers(loaded: Callable[..., Backbone]) -> None:
    """With steps of 1; its own cache has an entry per layer, which tied layers must not share."""
    backbone = loaded("tiny-gpt2-shared", "text-generation")
    model, feed = SteppedModel(backbone), feed_of(backbone, batch=1)
    ids, mask = feed["input_ids"], feed["attention_mask"]
    generating: Any = backbone.model
    with torch.no_grad():
        expected = generating.generate(**feed, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=1)
        logits, past = model.decode(ids, mask)
        for _ in range(8):
            newest = logits[:, -1:].argmax(-1)
            ids, mask = torch.cat((ids, newest), dim=1), torch.cat((mask, torch.ones_like(newest)), dim=1)
            logits, past = model.decode(newest, mask, None, past)
    assert torch.equal(ids, expected)


def test_a_cache_of_other_steps_is_refused(loaded: Callable[..., Backbone]) -> None:
    backbone = loaded("tiny-gpt2-shared", "text-generation")
    feed = feed_of(backbone)
    longer = {**feed, "attention_mask": torch.ones(3, 18)}
    with torch.no_grad():
        _, cache = SteppedModel(backbone, stepping_for_ratio((6,), 2)).decode(**feed)
        _, whole = SteppedModel(backbone).decode(**feed)
        SteppedModel(backbone, Stepping.full((6,), "sublayer")).decode(**longer, past=whole)  # the same in either form
        for other in (stepping_for_ratio((6,), 3), stepping_for_ratio((6,), 2, "block")):
            with pytest.raises(InputError, match="a cache of other steps: got 3 steps, sublayer form") as caught:
                SteppedModel(backbone, other).decode(**longer, past=cache)
            assert "n is fixed for a whole generation" in str(caught.value)


@pytest.mark.parametrize(
    "name, task",
    [
        *(("tiny-albert", task) for task in models.HEAD_CLASSES),
        ("tiny-albert-groups", "sequence-classification"),
        ("tiny-gpt2-shared", "text-generation"),
    ],
)
def test_macs_are_those_that_are_computed(name: str, task: str, loaded: Callable[..., Backbone]) -> None:
    backbone, length = loaded(name, task), 9
    groups, full = facts_of(backbone).groups, cost(backbone, Stepping.full(facts_of(backbone).groups))
    outside = cost_outside(backbone)
    for ratio in ratios_that_work(groups):
        stepping = stepping_for_ratio(groups, ratio)
        feed = feed_of(backbone, batch=1, length=length)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            SteppedModel(backbone, stepping)(**feed)
        found = cost(backbone, stepping).macs(length)
        assert found == counter.get_total_flops() // 2
        inside = found - outside.macs(length)
        assert inside * sum(groups) == (full.macs(length) - outside.macs(length)) * stepping.n


def cost_outside(backbone: Backbone) -> Cost:
    """What n does not change: the line through the costs of two numbers of steps, at none."""
    groups = facts_of(backbone).groups
    one, two = (cost(backbone, Stepping.even(groups, [count] * len(groups))) for count in (1, 2))
    return Cost(fixed=2 * one.fixed - two.fixed, per_token=2 * one.per_token - two.per_token)


def test_facts(loaded: Callable[..., Backbone]) -> None:
    groups = facts_of(loaded("tiny-albert-groups"))
    assert (groups.groups, groups.inner, groups.iterations, groups.word_width, groups.types) == ((2, 2), 2, 4, 16, 2)
    assert facts_of(loaded("tiny-albert-groups").config) == groups
    decoder = facts_of(loaded("tiny-gpt2-shared", "text-generation"))
    assert (decoder.causal, decoder.groups, decoder.neurons, decoder.head_width) == (True, (6,), 64, 8)
    assert facts_of(loaded("tiny-gpt2-shared", "text-generation").config) == decoder
    assert facts_of(decoder) is decoder


# --- other methods ---------------------------------------------------------------------------------------------------


def test_other_methods_name_this_one(loaded: Callable[..., Backbone]) -> None:
    for name, task in (("tiny-albert", "sequence-classification"), ("tiny-gpt2-shared", "text-generation")):
        with pytest.raises(InputError, match="variator does not fit a model that shares its layers.* --method ode"):
            VariatorModel(loaded(name, task))
        with pytest.raises(InputError, match="COST-EFF does not fit this architecture.*--method ode"):
            HostFacts.of(loaded(name, task))
