"""Building assemblies: what is in the bundle, every tile stored once, and texts written with nothing but its graphs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from compexport.errors import InputError, ParityError
from engines.bundle import Bundle
from engines.manifest import DECODER, DECODER_WITH_PAST, ENCODER, PAST, PRESENT
from exporter import family
from exporter.backbone import load_seq2seq
from exporter.graphs import modular_join
from exporter.graphs.modular import ModularFamily
from exporter.graphs.modular_trace import cache_names
from exporter.methods.assembly import Assembly, spans
from exporter.methods.modular import ModularModel
from exporter.methods.modular_checkpoint import save_modular, untrained_modular
from exporter.plans import PLANS, plan_of
from exporter.plans.modular import ModularPlan
from exporter.weights import INLINE_BYTES, stored_places
from tests.models import SHALLOW_SEQ2SEQ
from tests.traces import Traces

NAMES = sorted(SHALLOW_SEQ2SEQ)
TASK = "text2text-generation"
SEED = 5
UNEVEN = Assembly((1, 1, 2), (2, 1, 1))
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def modular(tiny: Callable[..., Path]) -> Callable[[str], ModularModel]:
    made: dict[str, ModularModel] = {}

    def get(name: str) -> ModularModel:
        if name not in made:
            made[name] = untrained_modular(load_seq2seq(tiny(name, TASK)), SEED)
        return made[name]

    return get


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], trace_memory: Traces
) -> Callable[[str], Bundle]:
    """``made("tiny-t5-four")``: ratio 4 and an uneven assembly of it, built once. Do not write into it."""
    built: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in built:
            with pytest.MonkeyPatch.context() as patch:
                trace_memory.replace(patch)
                output = tmp_path_factory.mktemp(name) / "bundle"
                options: dict[str, Any] = {"named": {"uneven": UNEVEN}, "pairs": name == NAMES[0]}
                report = family.build(tiny(name, TASK), [4], output, untrained=True, seed=SEED, **options)
                built[name] = Bundle.open(report.bundle)
        return built[name]

    return get


# --- what is in a bundle


def test_the_manifest(made: Callable[[str], Bundle], modular: Callable[[str], ModularModel]) -> None:
    manifest, model = made("tiny-t5-gated-four").manifest, modular("tiny-t5-gated-four")
    assert (manifest.task, manifest.method) == (TASK, "modular")
    assert manifest.backbone.layers == 8 and manifest.backbone.params == model.source.params
    assert list(manifest.variants) == ["modular-r1-fp32", "modular-r4-fp32", "modular-uneven-fp32"]
    one, four, uneven = manifest.variants.values()
    assert one.assembly == {"encoder": [1] * 4, "decoder": [1] * 4} and one.flops_ratio == 1
    assert four.assembly == {"encoder": [4], "decoder": [4]} and four.ratio == 4
    assert uneven.assembly == UNEVEN.document() and uneven.ratio == 1.3333
    assert [variant.untrained for variant in (one, four, uneven)] == [False, True, True]
    assert uneven.graphs == {
        ENCODER: "modular-e2x1+1x2",
        DECODER: "modular-d1x2+2x1",
        DECODER_WITH_PAST: "modular-d1x2+2x1-past",
    }
    assert four.params == model.cost(Assembly((4,), (4,))).params
    layer = {stack: model.facts.stack(stack).layer_params for stack in ("encoder", "decoder")}  # type: ignore[arg-type]
    assert (four.extra_params, uneven.extra_params) == (sum(layer.values()), sum(layer.values()))
    assert manifest.generation is not None and manifest.tokenizer is not None
    assert manifest.generation.model_dump() == {
        "eos_ids": [1],
        "bos_id": None,
        "pad_id": 0,
        "max_positions": None,
        "decoder_start_ids": [0],
    }
    assert manifest.tokenizer.inputs == ["input_ids", "attention_mask"]
    assert "graphs/weights.bin" in manifest.files and "tokenizer.json" in manifest.files


def test_costs_are_those_of_the_assembly(made: Callable[[str], Bundle], modular: Callable[[str], ModularModel]) -> None:
    manifest, model = made("tiny-t5-gated-four").manifest, modular("tiny-t5-gated-four")
    cost = model.cost(UNEVEN)
    of = {role: manifest.graphs[graph].cost for role, graph in manifest.variants["modular-uneven-fp32"].graphs.items()}
    assert of[ENCODER].macs(9) == cost.encoder(9)
    assert of[DECODER].macs(1, source=9) == cost.first_step(9)
    assert of[DECODER_WITH_PAST].token_macs(4, source=9) == cost.step(9, 4)
    four = manifest.variants["modular-r4-fp32"]
    whole = model.cost(Assembly.base(model.facts)).generation(128, 32)
    assert four.flops_ratio == whole / model.cost(Assembly((4,), (4,))).generation(128, 32)


def test_bart_forces_its_end(made: Callable[[str], Bundle]) -> None:
    generation = made("tiny-bart-four").manifest.generation
    assert generation is not None
    assert (generation.max_positions, generation.forced_eos_id, generation.decoder_start_ids) == (160, 2, [2])


@pytest.mark.parametrize("name", NAMES)
def test_names_and_axes_are_those_of_optimum(made: Callable[[str], Bundle], name: str) -> None:
    manifest = made(name).manifest
    graphs = [manifest.graphs[graph] for graph in manifest.variants["modular-uneven-fp32"].graphs.values()]
    inputs, outputs = ([[one.name for one in graph.inputs] for graph in graphs],
                       [[one.name for one in graph.outputs] for graph in graphs])  # fmt: skip
    assert inputs[0] == ["input_ids", "attention_mask"] and outputs[0] == ["last_hidden_state"]
    assert inputs[1] == ["encoder_attention_mask", "input_ids", "encoder_hidden_states"]
    assert outputs[1] == ["logits", *cache_names(PRESENT, 3)]
    assert inputs[2] == ["encoder_attention_mask", "input_ids", *cache_names(PAST, 3)]
    assert outputs[2] == ["logits", *cache_names(PRESENT, 3, source=False)]
    axes = {one.name: one.shape for graph in graphs for one in (*graph.inputs, *graph.outputs)}
    assert axes["past_key_values.2.decoder.key"][::2] == ["batch", "past_decoder_sequence"]
    assert axes["past_key_values.2.encoder.value"][::2] == ["batch", "encoder_sequence"]
    assert axes["present.2.decoder.key"][::2] == ["batch", "past_decoder_sequence + decoder_sequence"]
    assert axes["logits"][:2] == ["batch", "decoder_sequence"]


@pytest.mark.parametrize("name", NAMES)
def test_every_tile_is_stored_once_under_its_name(
    made: Callable[[str], Bundle], modular: Callable[[str], ModularModel], name: str
) -> None:
    bundle, model = made(name), modular(name)
    tensors = {**model.base.state_dict(), **model.module_tensors()}
    used = {
        model.source_names(assembled)[key]
        for assembly in (Assembly.base(model.facts), Assembly((4,), (4,)), UNEVEN)
        for assembled in (model.assemble(assembly),)
        for key in assembled.state_dict()
    }
    places = stored_places(bundle.path / graph.path for graph in bundle.manifest.graphs.values())
    stored = {key.removesuffix(".T"): where for key, where in places.items()}
    assert len(stored) == len(places) and all(len(where) == 1 for where in stored.values())
    # Some constants of a graph are no tensor of the model: the buckets of relative positions.
    own = {key: where for key, where in stored.items() if key in tensors}
    assert len(stored) - len(own) <= 2
    large = {key for key in used if tensors[key].numel() * 4 >= INLINE_BYTES and key != "final_logits_bias"}
    contents = {tensors[key].numpy().tobytes() for key in large}
    assert own.keys() <= large
    assert sum(length for _, length in set().union(*own.values())) == sum(map(len, contents))


def test_a_tile_that_is_stored_twice_is_noticed(
    made: Callable[[str], Bundle], modular: Callable[[str], ModularModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, model = made("tiny-t5-four"), modular("tiny-t5-four")
    built = ModularFamily(ModularPlan(bundle.path, (1,)), model)
    graphs = [bundle.path / graph.path for graph in bundle.manifest.graphs.values()]
    places = {**stored_places(graphs), "transpose": {(0, 4112), (8192, 4112)}}  # a table of each stack, computed
    monkeypatch.setattr("exporter.graphs.modular.stored_places", lambda paths: places)
    built.check_weights(graphs)
    twice = {**places, "shared.weight.T": {(0, 64)}}
    monkeypatch.setattr("exporter.graphs.modular.stored_places", lambda paths: twice)
    with pytest.raises(ValueError, match=r"shared\.weight is stored 2 times"):
        built.check_weights(graphs)


def test_pairs_need_no_more_graphs(made: Callable[[str], Bundle]) -> None:
    manifest = made(NAMES[0]).manifest
    pairs = {name: variant for name, variant in manifest.variants.items() if name.startswith("modular-e")}
    assert len(pairs) == 3 * 3 - 3 and len(manifest.graphs) == 3 * 3
    crossed = pairs["modular-e4x1-d1x4-fp32"]
    assert crossed.assembly == {"encoder": [1] * 4, "decoder": [4]} and crossed.ratio == 1.6
    assert crossed.graphs[ENCODER] == manifest.variants["modular-r1-fp32"].graphs[ENCODER]
    assert crossed.graphs[DECODER] == manifest.variants["modular-r4-fp32"].graphs[DECODER]


# --- texts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["modular-r1-fp32", "modular-r4-fp32", "modular-uneven-fp32"])
def test_tokens_by_hand_are_those_of_transformers(
    made: Callable[[str], Bundle], modular: Callable[[str], ModularModel], name: str, variant: str
) -> None:
    """Greedy, with a padded text in the batch, by plain sessions and a loop; caches are numbered from 0 by tile."""
    bundle, model = made(name), modular(name)
    found = bundle.manifest.variants[variant]
    assert found.assembly is not None
    assembly = Assembly(tuple(found.assembly["encoder"]), tuple(found.assembly["decoder"]))
    reference = model.base if set(assembly.encoder) == {1} else model.assemble(assembly)
    ids = np.random.default_rng(2).integers(5, 90, (2, 9))
    mask = np.array([[1] * 9, [1] * 5 + [0] * 4])
    pad = model.source.generation.pad
    with torch.no_grad():
        expected = reference.generate(
            input_ids=torch.from_numpy(ids),
            attention_mask=torch.from_numpy(mask),
            max_new_tokens=12,
            min_new_tokens=12,  # whatever is likeliest ends no text, and the forced end comes last
            do_sample=False,
            forced_eos_token_id=None,
        )[:, 1:].numpy()
    got = _greedy(bundle, variant, ids, mask, model.source.generation.start, ends=model.source.generation.eos, steps=12)
    assert pad is not None and (got == expected).all()


def _greedy(
    bundle: Bundle, variant: str, ids: np.ndarray, mask: np.ndarray, start: int, *, ends: tuple[int, ...], steps: int
) -> np.ndarray:
    """Tokens [B,steps] that never end a text."""
    sessions = _sessions(bundle, variant)
    states = _run(sessions[ENCODER], {"input_ids": ids, "attention_mask": mask})["last_hidden_state"]
    tokens = np.full((len(ids), 1), start)
    made = _run(
        sessions[DECODER], {"encoder_attention_mask": mask, "input_ids": tokens, "encoder_hidden_states": states}
    )
    chosen: list[np.ndarray] = []
    cache: Arrays = {}
    while True:
        scores = made.pop("logits")[:, -1]
        scores[:, list(ends)] = -np.inf
        chosen.append(scores.argmax(axis=1))
        if len(chosen) == steps:
            return np.stack(chosen, axis=1)
        cache |= {name.replace(PRESENT, PAST): array for name, array in made.items()}
        feed = {"encoder_attention_mask": mask, "input_ids": chosen[-1][:, None], **cache}
        made = _run(sessions[DECODER_WITH_PAST], feed)


def _sessions(bundle: Bundle, variant: str) -> dict[str, Any]:
    paths = {
        role: bundle.manifest.graphs[graph].path for role, graph in bundle.manifest.variants[variant].graphs.items()
    }
    return {
        role: onnxruntime.InferenceSession(str(bundle.path / path), providers=["CPUExecutionProvider"])
        for role, path in paths.items()
    }


def _run(session: Any, feed: Arrays) -> Arrays:
    return dict(zip([one.name for one in session.get_outputs()], session.run(None, feed), strict=True))


def test_a_graph_of_other_tiles_is_refused(
    tiny: Callable[..., Path], tmp_path: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(modular_join, "spans", lambda tiling: spans(tiling)[::-1])
    with pytest.raises(ParityError, match="modular-e4x1 at batch 1"):
        family.build(tiny("tiny-t5-gated-four", TASK), [], tmp_path / "b", untrained=True)
    assert not (tmp_path / "b").exists()


# --- builds


@pytest.fixture
def trained(tmp_path: Path, modular: Callable[[str], ModularModel]) -> Path:
    """A checkpoint with a named assembly."""
    save_modular(tmp_path / "checkpoint", modular("tiny-t5-gated-four"), assemblies={"uneven": UNEVEN})
    return tmp_path / "checkpoint"


def test_a_rebuild_makes_only_what_changed(
    trained: Path, tmp_path: Path, traces: Traces, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = family.build(trained, [4], tmp_path / "b")
    assert not any(variant.untrained for variant in first.manifest.variants.values())
    more = family.build(trained, [4, 1.6], tmp_path / "b")
    assert more.reused == set(first.manifest.graphs) == set(more.manifest.graphs)  # 4 + 1 layers: both were there
    with monkeypatch.context() as patch:
        patch.setattr(ModularPlan, "load", lambda self: pytest.fail("nothing is to be loaded"))
        again = family.build(trained, [4, 1.6], tmp_path / "b")
    assert again.reused == set(more.manifest.graphs) and again.manifest == more.manifest
    even = family.build(trained, [4], tmp_path / "b", strategy="size-first")
    assert even.reused == set(more.manifest.graphs), "4 is one tile a stack by either strategy"
    assert even.manifest.variants["modular-r4-fp32"].settings["strategy"] == "size-first"
    (trained / "special_tokens_map.json").write_text("{}")
    (trained / "generation_config.json").write_text(
        json.dumps({"num_beams": 3, "no_repeat_ngram_size": 2, "max_length": 20, "eos_token_id": 1, "pad_token_id": 0,
                    "decoder_start_token_id": 0, "forced_bos_token_id": 9, "diversity_penalty": 0.5})
    )  # fmt: skip
    other = family.build(trained, [4, 1.6], tmp_path / "b")
    changed = other.manifest.generation
    assert other.reused == set(more.manifest.graphs), "no graph depends on how texts are written"
    assert changed is not None and changed.defaults == {"num_beams": 3, "no_repeat_ngram_size": 2, "max_length": 20}
    assert changed.forced_bos_id == 9
    assert (tmp_path / "b/graphs/model/special_tokens_map.json").read_text() == "{}"


def test_size_first_takes_other_assemblies(trained: Path) -> None:
    plans = [
        plan_of(trained, None, None)(trained, (1, 2), untrained=True, **o) for o in ({}, {"strategy": "size-first"})
    ]
    two = [plan.assemblies["modular-r2-fp32"] for plan in plans]
    assert two == [Assembly((1, 1, 2), (4,)), Assembly((2, 2), (2, 2))]
    assert [len(plan.graphs()) for plan in plans] == [6, 6]


def test_a_plan_knows_what_another_strategy_chose(trained: Path) -> None:
    variants: Any = {f"modular-r{ratio}-fp32": SimpleNamespace(settings=found) for ratio, found in
                     ((1, {}), (2, {"strategy": "calibrated"}), (4, {"strategy": "size-first"}))}  # fmt: skip
    plan = ModularPlan(trained, (1, 2, 4), strategy="size-first", chosen={2: Assembly((2, 2), (2, 2))})
    assert not plan.describes(variants), "of a generation_config.json that is not this one"
    variants["modular-r1-fp32"].settings["used_sha256"] = plan.used_sha256
    assert plan.describes(variants)
    assert not replace(plan, chosen={}).describes(variants)
    assert not replace(plan, strategy="speed-first").describes(variants)


def test_what_cannot_be_built(tiny: Callable[..., Path], trained: Path, tmp_path: Path) -> None:
    bare = tiny("tiny-t5-gated-four", TASK)
    assert plan_of(bare, None, None) is PLANS["modular"]
    for folder, ratios, options, message in (
        (bare, [4], {}, "no trained modules for ratio 4.*compexport train modular"),
        (bare, [], {"named": {"uneven": UNEVEN}}, "named assemblies need modules"),
        (trained, [9], {}, "ratio: got 9, expected at most 4 for this model"),
        (trained, [4], {"named": {"r4": UNEVEN}}, "name of an assembly: got 'r4'"),
        (trained, [4], {"named": {"a/b": UNEVEN}}, "name of an assembly: got 'a/b'"),
        (trained, [4], {"named": {"wrong": Assembly((4,), (1, 2, 1))}}, "assembly wrong: decoder: tile of size 2"),
        (trained, [4], {"task": "label-words"}, "task of the method modular: got 'label-words'"),
    ):
        with pytest.raises(InputError, match=message):
            family.build(folder, ratios, tmp_path / "b", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "b").exists()


def test_damaged_modules(trained: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(trained, tmp_path / "copy"))
    (copy / "modular.safetensors").unlink()
    with pytest.raises(InputError, match=r"modular\.safetensors: missing"):
        family.build(copy, [4], tmp_path / "b")
