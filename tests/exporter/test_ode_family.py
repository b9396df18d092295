"""Building models that share layers: what is in the bundle, one copy of every weight, and graphs that agree."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from compexport.errors import InputError
from engines.bundle import Bundle
from engines.manifest import EXIT_OUTPUTS, HIDDEN, PREVIOUS, STEP_SIZE, Variant
from exporter import family
from exporter.checkpoint import save_checkpoint
from exporter.graphs.ode_unroll import step_matrices
from exporter.methods.ode_exits import ExitHeads
from exporter.methods.ode_stepping import Stepping
from tests.models import FFN, LABELS
from tests.models import HIDDEN as WIDTH
from tests.traces import Traces

Arrays = dict[str, np.ndarray]
CLASSES = len(LABELS["sequence-classification"])
MADE = ("ode-albert", "ode-groups", "ode-gpt2")


@pytest.fixture(scope="module")
def with_heads(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Path:
    """tiny-albert, which classifies, with exit heads for ratio 2 (three steps)."""
    model = tiny("tiny-albert", "sequence-classification")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        tensors = ExitHeads(3, WIDTH, CLASSES).state_dict()
    folder = tmp_path_factory.mktemp("heads") / "checkpoint"
    steps = {"2": [[3, 2, 1]]}
    save_checkpoint(folder, model, "ode", {"form": "block", "steps": steps}, {2: tensors})
    return folder


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path], with_heads: Path, trace_memory: Traces
) -> Callable[[str], Bundle]:
    """The bundles of this module by name, each built once."""
    built: dict[str, Bundle] = {}
    recipes: dict[str, tuple[Path, list[float], dict[str, Any]]] = {
        "ode-albert": (with_heads, [2, 3], {"step_engine": True, "prefixes": True}),
        "ode-groups": (tiny("tiny-albert-groups"), [2], {"step_engine": True, "form": "sublayer"}),
        "ode-gpt2": (tiny("tiny-gpt2-shared", "text-generation"), [2], {}),
    }

    def get(name: str) -> Bundle:
        if name not in built:
            folder, ratios, options = recipes[name]
            with pytest.MonkeyPatch.context() as patch:
                trace_memory.replace(patch)
                built[name] = Bundle.open(
                    family.build(folder, ratios, tmp_path_factory.mktemp(name) / "b", **options).bundle
                )
        return built[name]

    return get


def run(bundle: Bundle, graph: str, feed: Arrays) -> Arrays:
    facts = bundle.manifest.graphs[graph]
    path = bundle.path / facts.path
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {value.name: feed[value.name] for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def texts(batch: int = 2, length: int = 11, vocabulary: int = 200) -> Arrays:
    generator = np.random.default_rng(3)
    mask = np.ones((batch, length), np.int64)
    mask[0, 8:] = 0
    ids = generator.integers(5, vocabulary, (batch, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


# --- what is in a bundle ---------------------------------------------------------------------------------------------


def test_variants_of_an_encoder(made: Callable[[str], Bundle]) -> None:
    manifest = made("ode-albert").manifest
    assert list(manifest.variants) == [
        *(f"ode-r{ratio}-fp32" for ratio in (1, 2, 3)),
        *(f"ode-r{ratio}-step-fp32" for ratio in (1, 2, 3)),
    ]
    whole, half, third, *engines = manifest.variants.values()
    assert whole.graphs == {"encoder": "ode-r1"} and whole.steps == [[1] * 6]
    assert half.steps == [[3, 2, 1]] and half.exits == [1, 2, 3]
    assert third.settings == {"form": "block", "steps": [[3, 3]], "n": 2, "full_steps": 6}
    assert set(half.graphs) == {*(f"segment-{i}" for i in range(3)), "all-exits", *(f"prefix-{i}" for i in (1, 2, 3))}
    shared = {"embed": "ode-embed", "step": "ode-step", "head": "ode-head"}
    assert engines[0].graphs == engines[2].graphs == shared
    assert engines[1].graphs == {**shared, **{f"head-{i}": f"ode-r2-h{i}" for i in (1, 2, 3)}}
    assert engines[1].exits == half.exits and engines[1].steps == half.steps
    assert half.extra_params == 2 * (2 * WIDTH * WIDTH + WIDTH + (WIDTH + 1) * CLASSES)
    assert not any(variant.untrained for variant in manifest.variants.values())


def test_every_graph_was_compared_with_pytorch(made: Callable[[str], Bundle]) -> None:
    for name in MADE:
        for graph in made(name).manifest.graphs.values():
            assert graph.parity.max_abs <= graph.parity.tolerance == 1e-4
            assert len({length for _, length in graph.parity.shapes}) > 3, "several lengths"


def test_costs_are_n_steps_of_the_whole(made: Callable[[str], Bundle]) -> None:
    """Property 9: the encoder's multiply-accumulates at n steps are n/N of all; parts add up to the whole."""
    graphs = made("ode-albert").manifest.graphs
    embed, step, head = (graphs[f"ode-{part}"].cost.macs(64) for part in ("embed", "step", "head"))
    assert graphs["ode-r1"].cost.macs(64) == embed + 6 * step + head
    assert graphs["ode-r3"].cost.macs(64) == embed + 2 * step + head
    exits = [graphs[f"ode-r2-h{number}"].cost.macs(64) for number in (1, 2, 3)]
    segments = [graphs[f"ode-r2-s{number}"].cost.macs(64) for number in range(3)]
    assert segments == [embed + step + exits[0], step + exits[1], step + head]
    assert exits[2] == head


def places(bundle: Bundle, graph: str) -> set[str]:
    """Where in the weights file what a graph stores outside of itself is."""
    model = onnx.load(bundle.path / bundle.manifest.graphs[graph].path, load_external_data=False)
    return {
        next(e.value for e in t.external_data if e.key == "offset") for t in model.graph.initializer if t.external_data
    }


@pytest.mark.parametrize(
    ("name", "layers", "matrices"), [("ode-albert", 1, 6), ("ode-groups", 4, 6), ("ode-gpt2", 1, 4)]
)
def test_one_copy_of_the_shared_weights(made: Callable[[str], Bundle], name: str, layers: int, matrices: int) -> None:
    """Property 7: what is stored of the shared layers does not depend on n."""
    bundle = made(name)
    for graph in ("ode-r1", "ode-r3", "ode-r2-all") if name == "ode-albert" else ("ode-r1", "ode-r2"):
        model = onnx.load(bundle.path / bundle.manifest.graphs[graph].path)
        shapes = list(step_matrices(model).values())
        assert len(shapes) == matrices * layers, graph
        assert sum(sorted(shape) == [WIDTH, FFN] for shape in shapes) == 2 * layers, graph
        stored = [tensor.raw_data for tensor in model.graph.initializer if len(tensor.raw_data) >= 1024]
        assert len(set(stored)) == len(stored), graph
    assert places(bundle, "ode-r1") == places(bundle, "ode-r3" if name == "ode-albert" else "ode-r2")


def test_the_engine_packs_one_copy(made: Callable[[str], Bundle]) -> None:
    """ONNX Runtime lays out matrices anew for its kernels: that of six uses and of two is the same one too."""
    bundle = made("ode-albert")
    engines = {engine.graph: bundle.path / engine.path for engine in bundle.manifest.engines.values()}

    def packed(graph: str) -> set[str]:
        model = onnx.load(engines[graph], load_external_data=False)
        return {e.value for t in model.graph.initializer for e in t.external_data if e.key.startswith("prepacked")}

    assert packed("ode-r1") and packed("ode-r1") == packed("ode-r3")


def test_steps_of_one_are_the_layer_alone(made: Callable[[str], Bundle]) -> None:
    bundle = made("ode-albert")
    for graph, sizes in (("ode-r1", 0), ("ode-r2-all", 2), ("ode-r3", 1)):
        model = onnx.load(bundle.path / bundle.manifest.graphs[graph].path, load_external_data=False)
        assert sum(tensor.name.startswith(f"{STEP_SIZE}.") for tensor in model.graph.initializer) == sizes, graph


# --- graphs agree with each other ------------------------------------------------------------------------------------


def looped(bundle: Bundle, variant: Variant, feed: Arrays) -> Iterator[np.ndarray]:
    """The states that a caller's own loop over a step engine goes through, embeddings first."""
    h = run(bundle, variant.graphs["embed"], feed)[HIDDEN]
    yield h
    assert variant.steps is not None
    for group, sizes in enumerate(variant.steps):
        graph = variant.graphs["step" if len(variant.steps) == 1 else f"step-{group}"]
        for dt in sizes:
            step = {PREVIOUS: h, "attention_mask": feed["attention_mask"], STEP_SIZE: np.array([dt], np.float32)}
            h = run(bundle, graph, step)[HIDDEN]
            yield h


@pytest.mark.parametrize(("name", "ratio"), [("ode-albert", 1), ("ode-albert", 3), ("ode-groups", 2)])
def test_a_loop_over_the_step_engine_is_the_unrolled_graph(
    made: Callable[[str], Bundle], name: str, ratio: int
) -> None:
    bundle, feed = made(name), texts()
    variant = bundle.manifest.variants[f"ode-r{ratio}-step-fp32"]
    *_, h = looped(bundle, variant, feed)
    found = run(bundle, variant.graphs["head"], {PREVIOUS: h, "attention_mask": feed["attention_mask"]})
    unrolled = run(bundle, f"ode-r{ratio}", feed)
    assert found.keys() == unrolled.keys()
    for output, values in unrolled.items():
        np.testing.assert_allclose(found[output], values, atol=1e-4)


def test_segments_prefixes_heads_and_all_exits_say_the_same(made: Callable[[str], Bundle]) -> None:
    bundle, feed = made("ode-albert"), texts()
    mask = feed["attention_mask"]
    every = run(bundle, "ode-r2-all", feed)
    states = list(looped(bundle, bundle.manifest.variants["ode-r2-step-fp32"], feed))
    found = run(bundle, "ode-r2-s0", feed)
    for step in (1, 2, 3):
        if step > 1:
            kept = {PREVIOUS: found[HIDDEN], "attention_mask": mask, "rows": np.arange(2)}
            found = run(bundle, f"ode-r2-s{step - 1}", kept)
        prefix = run(bundle, f"ode-r2-p{step}", feed)
        head = run(bundle, f"ode-r2-h{step}", {PREVIOUS: states[step], "attention_mask": mask})
        for name in EXIT_OUTPUTS:
            for other in (found, prefix, head):
                np.testing.assert_allclose(other[name], every[name][:, step - 1], atol=1e-4, err_msg=f"{name} {step}")
    assert every["logits"].shape == (2, 3, CLASSES) and every["entropy"].shape == (2, 3)


def test_rows_that_leave_do_not_change_the_others(made: Callable[[str], Bundle]) -> None:
    bundle, feed = made("ode-albert"), texts(batch=3)
    hidden = run(bundle, "ode-r2-s0", feed)[HIDDEN]
    later = {PREVIOUS: hidden, "attention_mask": feed["attention_mask"]}
    everyone = run(bundle, "ode-r2-s1", {**later, "rows": np.arange(3)})
    some = run(bundle, "ode-r2-s1", {**later, "rows": np.array([2, 0])})
    np.testing.assert_allclose(some["logits"], everyone["logits"][[2, 0]], atol=1e-5)
    np.testing.assert_allclose(some[HIDDEN], everyone[HIDDEN][[2, 0]], atol=1e-5)


# --- decoders --------------------------------------------------------------------------------------------------------


def prompt(ids: np.ndarray, mask: np.ndarray | None = None) -> Arrays:
    mask = np.ones_like(ids) if mask is None else mask
    return {"input_ids": ids, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}


def past_of(outputs: Arrays, n: int) -> Arrays:
    pairs = [(step, kind) for step in range(n) for kind in ("key", "value")]
    return {f"past_key_values.{step}.{kind}": outputs[f"present.{step}.{kind}"] for step, kind in pairs}


def no_past(batch: int, n: int) -> Arrays:
    pairs = [(step, kind) for step in range(n) for kind in ("key", "value")]
    return {f"past_key_values.{step}.{kind}": np.zeros((batch, 4, 0, WIDTH // 4), np.float32) for step, kind in pairs}


def test_a_decoder_reads_and_gives_one_entry_a_step(made: Callable[[str], Bundle]) -> None:
    manifest = made("ode-gpt2").manifest
    assert manifest.task == "text-generation" and manifest.generation is not None
    assert manifest.generation.model_dump() == {"eos_ids": [2], "bos_id": 2, "pad_id": 1, "max_positions": 160}
    assert manifest.variants["ode-r2-fp32"].graphs == {"decoder": "ode-r2"}
    graph = manifest.graphs["ode-r2"]
    names = [f"{kind}.{step}.{part}" for kind in ("present",) for step in range(3) for part in ("key", "value")]
    assert [value.name for value in graph.outputs] == ["logits", *names]
    shapes = {value.name: value.shape for value in (*graph.inputs, *graph.outputs)}
    assert list(shapes)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert shapes["attention_mask"] == ["batch", "total"] and shapes["logits"] == ["batch", "sequence", 303]
    assert shapes["past_key_values.2.value"] == ["batch", 4, "past", WIDTH // 4]
    assert shapes["present.2.value"] == ["batch", 4, "total", WIDTH // 4]


@pytest.mark.parametrize(("ratio", "n"), [(1, 6), (2, 3)])
def test_token_by_token_is_the_whole_text_at_once(made: Callable[[str], Bundle], ratio: int, n: int) -> None:
    """Property 8: decoding with a cache and without one agree at each n."""
    bundle = made("ode-gpt2")
    ids = np.random.default_rng(0).integers(5, 300, (2, 9))
    whole = run(bundle, f"ode-r{ratio}", {**prompt(ids), **no_past(2, n)})
    outputs = run(bundle, f"ode-r{ratio}", {**prompt(ids[:, :4]), **no_past(2, n)})
    logits = [outputs["logits"]]
    for end in range(5, 10):
        feed = prompt(ids[:, :end])
        feed |= {name: feed[name][:, -1:] for name in ("input_ids", "position_ids")}
        outputs = run(bundle, f"ode-r{ratio}", {**feed, **past_of(outputs, n)})
        logits.append(outputs["logits"])
    np.testing.assert_allclose(np.concatenate(logits, axis=1), whole["logits"], atol=1e-4)
    np.testing.assert_allclose(outputs["present.1.key"], whole["present.1.key"], atol=1e-4)


def test_padding_on_the_left_changes_nothing(made: Callable[[str], Bundle]) -> None:
    bundle = made("ode-gpt2")
    ids = np.random.default_rng(1).integers(5, 300, (1, 6))
    alone = run(bundle, "ode-r2", {**prompt(ids), **no_past(1, 3)})["logits"]
    padded = np.concatenate([np.ones((1, 4), np.int64), ids], axis=1)
    mask = np.array([[0] * 4 + [1] * 6])
    found = run(bundle, "ode-r2", {**prompt(padded, mask), **no_past(1, 3)})["logits"]
    np.testing.assert_allclose(found[:, 4:], alone, atol=1e-4)


# --- rebuilding ------------------------------------------------------------------------------------------------------


def test_a_rebuild_makes_only_what_changed(tiny: Callable[..., Path], tmp_path: Path, traces: Traces) -> None:
    folder, bundle = tiny("tiny-albert", "sequence-classification"), tmp_path / "bundle"
    family.build(folder, [2], bundle)
    assert family.build(folder, [2], bundle).reused == {"ode-r1", "ode-r2"}
    other = {2: Stepping("sublayer", ((2.5, 2, 1.5),))}
    changed = family.build(folder, [2], bundle, steppings=other, step_engine=True)
    assert changed.reused == {"ode-r1"}
    assert changed.manifest.variants["ode-r2-fp32"].steps == [[2.5, 2, 1.5]]
    assert len(set(traces.calls)) == len(traces.made.keys() & set(traces.calls)) <= 4, "a piece is one, whatever n"


# --- what cannot be built --------------------------------------------------------------------------------------------


def test_plans_that_do_not_work(tiny: Callable[..., Path], with_heads: Path, tmp_path: Path) -> None:
    albert, decoder = tiny("tiny-albert", "sequence-classification"), tiny("tiny-gpt2-shared", "text-generation")
    output = tmp_path / "bundle"
    with pytest.raises(InputError, match="no whole number of steps at ratio 4: got 6 iterations, expected a ratio"):
        family.build(albert, [4], output)
    with pytest.raises(InputError, match="--exits needs exit heads: got none; train them .* --exit-heads "):
        family.build(albert, [2], output, exits=(1,))
    with pytest.raises(InputError, match="--exits needs exit heads: got none for these steps"):
        family.build(with_heads, [2], output, exits=(1,), form="sublayer")
    with pytest.raises(InputError, match="--step-engine: got a model that generates text"):
        family.build(decoder, [2], output, step_engine=True)
    forms = {2: Stepping("sublayer", ((2,) * 3,)), 3: Stepping("block", ((3,) * 2,))}
    with pytest.raises(InputError, match="forms of a step engine: got block and sublayer"):
        family.build(albert, [2, 3], output, steppings=forms, step_engine=True)
    with pytest.raises(InputError, match="steps of ratio 2: sum of the steps: got 5"):
        family.build(albert, [2], output, steppings={2: Stepping("block", ((3, 2),))})
    assert not output.exists()
