"""Assemblies of layers and modules: the properties of section 3g that need no graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compexport.errors import InputError
from exporter.backbone import load_seq2seq
from exporter.methods.assembly import Assembly, assembly_for_ratio
from exporter.methods.modular import ModularModel
from exporter.methods.modular_checkpoint import untrained_modular
from exporter.methods.modular_steps import CachedStep, EncoderPass, FirstStep
from tests.models import SEQ2SEQ

NAMES = sorted(SEQ2SEQ)
TASK = "text2text-generation"
ONES, SIXES = (1,) * 12, (6, 6)
# Layers and modules of all sizes, a deeper encoder, a deeper decoder.
ASSEMBLIES = [
    Assembly((1, 1, 2, 2, 6), (3, 1, 1, 1, 2, 4)),
    Assembly(ONES, SIXES),
    Assembly(SIXES, ONES),
    Assembly(SIXES, SIXES),
]


@pytest.fixture(scope="module")
def modular(tiny: Callable[..., Path]) -> Callable[[str], ModularModel]:
    """``modular("tiny-t5-twelve")``: modules that do something of their own; loaded once, never modified."""
    made: dict[str, ModularModel] = {}

    def get(name: str) -> ModularModel:
        if name not in made:
            made[name] = untrained_modular(load_seq2seq(tiny(name, TASK)), seed=1)
        return made[name]

    return get


@pytest.fixture(params=NAMES)
def model(request: pytest.FixtureRequest, modular: Callable[[str], ModularModel]) -> ModularModel:
    return modular(request.param)


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def batch() -> dict[str, Tensor]:
    """Two texts, the second padded, and four target tokens each."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(5, 90, (2, 9), generator=draw)
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    targets = torch.randint(5, 90, (2, 4), generator=draw)
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}


def cached_logits(model: Any) -> tuple[Tensor, Any]:
    """One target token at a time, and the cache that is left."""
    given = batch()
    targets, cache, parts = given.pop("decoder_input_ids"), None, []
    for i in range(targets.shape[1]):
        out = model(**given, decoder_input_ids=targets[:, i : i + 1], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    return torch.cat(parts, dim=1), cache


# --- 1: nothing but tiles of size 1


def test_all_ones_are_the_base_bit_for_bit(model: ModularModel) -> None:
    assembled = model.assemble(Assembly.base(model.facts))
    ours, theirs = (each(**batch()) for each in (assembled, model.base))
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.encoder_last_hidden_state, theirs.encoder_last_hidden_state)
    assert torch.equal(cached_logits(assembled)[0], cached_logits(model.base)[0])


# --- 2: a module that is a copy of a layer, beside identity layers


@pytest.mark.parametrize("name", ["tiny-t5-twelve", "tiny-t5-gated-twelve", "tiny-mbart-twelve"])
@pytest.mark.parametrize(("rule", "kept"), [("first", 0), ("last", 2)])
def test_copies_stand_for_spans_of_one_layer_and_identities(
    name: str, rule: Any, kept: int, tiny: Callable[..., Path]
) -> None:
    base = load_seq2seq(tiny(name, TASK))
    for stack in base.host.stacks(base.model):
        for index, layer in enumerate(base.host.layers_of(stack)):
            if index % 3 != kept:
                _make_identity(layer)
    model = ModularModel(base, init_rule=rule)
    threes = model.assemble(Assembly((3,) * 4, (3,) * 4))
    assert torch.equal(threes(**batch()).logits, model.base(**batch()).logits)
    sixes = model.assemble(Assembly(SIXES, SIXES))
    assert not torch.allclose(sixes(**batch()).logits, model.base(**batch()).logits)


def _make_identity(layer: Any) -> None:
    """A pre-norm layer whose sublayers add nothing."""
    for name, parameter in layer.named_parameters():
        if any(f"{part}." in name for part in ("o", "wo", "out_proj", "fc2")):
            parameter.zero_()


# --- 3: the base stays as it is


def test_assembling_leaves_the_base_alone(model: ModularModel) -> None:
    def state() -> Any:
        layers = [layer for stack in model.host.stacks(model.base) for layer in model.host.layers_of(stack)]
        numbers = [attention.layer_idx for layer in layers for attention in model.host.attentions(layer)]
        parts = [(name, id(part), len(part._forward_hooks)) for name, part in model.base.named_modules()]
        return numbers, parts, model.base.config.to_dict(), model.base(**batch()).logits.tolist()

    before = state()
    for assembly in ASSEMBLIES:
        model.assemble(assembly)(**batch())
        model.assemble(assembly, observed=True)(**batch(), output_attentions=True).logits  # noqa: B018
    assert state() == before
    again = model.assemble(Assembly.base(model.facts))
    assert again(**batch()).logits.tolist() == before[-1]


def test_no_tensor_is_copied(model: ModularModel) -> None:
    base = {id(parameter) for parameter in model.base.parameters()}
    modules = {id(parameter) for parameter in model.module_parameters()}
    for assembly in ASSEMBLIES:
        assembled = model.assemble(assembly)
        own = {id(parameter) for parameter in assembled.parameters()}
        assert own <= base | modules
        assert sum(parameter.numel() for parameter in assembled.parameters()) == model.cost(assembly).params


def test_tensors_know_where_they_come_from(model: ModularModel) -> None:
    stored = {**model.base.state_dict(), **model.module_tensors()}
    assembled = model.assemble(Assembly((2, 1, 1, 2, 6), SIXES))
    names = model.source_names(assembled)
    assert names.keys() == assembled.state_dict().keys()
    for name, tensor in assembled.state_dict().items():
        assert torch.equal(tensor, stored[names[name]])
    assert {name.split(".")[2] for name in names.values() if name.startswith("modules.encoder.")} == {"g2", "g6"}
    assert {name.split(".")[3] for name in names.values() if name.startswith("modules.encoder.g2.")} == {"0", "2"}


# --- 4: assemblies that do not fit


def test_a_misfit_is_refused(modular: Callable[[str], ModularModel]) -> None:
    model = modular("tiny-bart-twelve")
    for call in (model.assemble, model.cost):
        with pytest.raises(
            InputError, match="assembly: encoder: tile of size 2: got start 1, expected a multiple of 2"
        ):
            call(Assembly((1, 2, 3, 6), SIXES))
    with pytest.raises(InputError, match="init rule: got 'middle', expected first or last"):
        ModularModel(model.source, init_rule="middle")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="too few layers for modules: got 12 and 12 layers, expected a multiple of"):
        ModularModel(model.source, granularities=[5, 7])


# --- 6: caches


def test_cached_and_uncached_decoding_agree(model: ModularModel) -> None:
    named = [*ASSEMBLIES, *(assembly_for_ratio(model.facts, ratio, "size-first") for ratio in (1.5, 2, 4))]
    for assembly in named:
        assembled = model.assemble(assembly)
        logits, cache = cached_logits(assembled)
        torch.testing.assert_close(logits, assembled(**batch(), use_cache=False).logits, atol=2e-5, rtol=1e-5)
        assert len(cache.self_attention_cache) == len(cache.cross_attention_cache) == len(assembly.decoder)


def test_the_steps_of_generation_are_the_whole(model: ModularModel) -> None:
    assembled = model.assemble(ASSEMBLIES[0])
    given = batch()
    ids, mask, targets = given.values()
    states = EncoderPass(assembled)(ids, mask)
    logits, *kept = FirstStep(assembled)(targets[:, :2], states, mask)
    whole = assembled(**given).logits
    torch.testing.assert_close(logits, whole[:, :2], atol=2e-5, rtol=1e-5)
    logits, *grown = CachedStep(assembled)(targets[:, 2:], mask, *kept)
    torch.testing.assert_close(logits, whole[:, 2:], atol=2e-5, rtol=1e-5)
    assert len(kept) == 4 * 6
    assert [tensor.shape[2] for tensor in kept[:4]] == [2, 2, 9, 9]
    assert [tensor.shape[2] for tensor in grown] == [4] * 12


@pytest.mark.parametrize("name", ["tiny-t5-twelve", "tiny-bart-twelve"])
@pytest.mark.parametrize("assembly", [Assembly(SIXES, ONES), Assembly(ONES, SIXES)], ids=str)
def test_generate_runs_on_assemblies_of_unlike_depths(
    name: str, assembly: Assembly, modular: Callable[[str], ModularModel]
) -> None:
    assembled = modular(name).assemble(assembly)
    given = {key: batch()[key] for key in ("input_ids", "attention_mask")}
    for beams in (1, 3):
        settings = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False}
        cached, uncached = (assembled.generate(**given, **settings, use_cache=on) for on in (True, False))
        assert torch.equal(cached, uncached)


def test_a_cache_of_another_assembly_is_refused(model: ModularModel) -> None:
    target = batch()["decoder_input_ids"][:, :1]
    given = {**batch(), "decoder_input_ids": target}
    twos, threes = Assembly((2,) * 6, SIXES), Assembly((3,) * 4, SIXES)
    kept = model.assemble(twos)(**given, use_cache=True).past_key_values
    model.assemble(twos)(**given, past_key_values=kept)  # another one of the same tiles
    message = "cache of assembly e4x3-d2x6: got another model's, expected its own"
    for foreign in (kept, model.base(**given, use_cache=True).past_key_values):
        with pytest.raises(InputError, match=message):
            model.assemble(threes)(**given, past_key_values=foreign)


# --- 7: T5's table of relative positions


@pytest.mark.parametrize("name", ["tiny-t5-twelve", "tiny-t5-gated-twelve"])
@pytest.mark.parametrize("stack", [0, 1], ids=["encoder", "decoder"])
def test_positions_reach_whatever_comes_first(name: str, stack: int, tiny: Callable[..., Path]) -> None:
    model = untrained_modular(load_seq2seq(tiny(name, TASK)), seed=1)
    assert not [name for name in model.module_tensors() if "relative" in name]
    table = model.host.stacks(model.base)[stack].block[0].layer[0].SelfAttention.relative_attention_bias.weight
    assembled = [model.assemble(assembly) for assembly in (Assembly.base(model.facts), Assembly(SIXES, SIXES))]
    before = [each(**batch()).logits for each in assembled]
    table += torch.randn(table.shape, generator=torch.Generator().manual_seed(0))
    for old, each in zip(before, assembled, strict=True):
        assert (each(**batch()).logits - old).abs().max() > 1e-3


# --- an assembly is a plain shorter model


def test_an_assembly_saved_is_an_ordinary_model(model: ModularModel, tmp_path: Path) -> None:
    assembled = model.assemble(ASSEMBLIES[0])
    assembled.save_pretrained(tmp_path)
    plain = type(model.base).from_pretrained(tmp_path, attn_implementation="eager").eval()
    depths = [len(model.host.layers_of(stack)) for stack in model.host.stacks(plain)]
    assert depths == [5, 6]
    assert torch.equal(plain(**batch()).logits, assembled(**batch()).logits)


# --- what distillation reads


def test_an_observed_assembly_shows_states_and_scores(model: ModularModel) -> None:
    assembly = ASSEMBLIES[0]
    plain, observed = model.assemble(assembly), model.assemble(assembly, observed=True)
    probabilities = plain(**batch(), output_attentions=True)
    scores = observed(**batch(), output_attentions=True, output_hidden_states=True)
    assert torch.equal(scores.logits, probabilities.logits)
    for kind, count, queries, keys in (
        ("encoder_attentions", 5, 9, 9),
        ("decoder_attentions", 6, 4, 4),
        ("cross_attentions", 6, 4, 9),
    ):
        assert [tuple(each.shape) for each in scores[kind]] == [(2, 2, queries, keys)] * count
    # The first text has no padding, so its source scores need no mask to become probabilities.
    for kind in ("encoder_attentions", "cross_attentions"):
        for score, probability in zip(scores[kind], probabilities[kind], strict=True):
            assert torch.allclose(score[0].softmax(-1), probability[0], atol=1e-6)
    assert (len(scores.encoder_hidden_states), len(scores.decoder_hidden_states)) == (6, 7)
    last = model.host.layers_of(model.host.stacks(observed)[0])[-1]
    seen: list[Any] = []
    last.register_forward_hook(lambda _, args, out: seen.append(out[0] if isinstance(out, tuple) else out))
    again = observed(**batch(), output_hidden_states=True)
    assert torch.equal(again.encoder_hidden_states[-1], seen[0])


# --- training


def test_gradients_reach_the_modules_in_use_and_nothing_else(model: ModularModel) -> None:
    assembled = model.assemble(Assembly((1, 1, 2, 2, 6), (*[1] * 6, 6)))
    given = batch()
    with torch.enable_grad():
        assembled(**given, labels=given["decoder_input_ids"]).loss.backward()
    reached = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    parts = {".".join(name.split(".")[1:4]) for name in reached}
    assert parts == {"encoder.g2.1", "encoder.g2.2", "encoder.g6.1", "decoder.g6.1"}
    assert all(name.startswith("module_stacks.") for name in reached)


def test_training_mode_of_an_assembly_is_its_own(modular: Callable[[str], ModularModel]) -> None:
    model = modular("tiny-bart-twelve")
    assembled = model.assemble(ASSEMBLIES[0]).train()
    assert all(part.training for part in assembled.modules())
    assert not any(part.training for part in model.modules())
