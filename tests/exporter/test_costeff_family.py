"""A COST-EFF family: segments, prefixes and all exits say the same; what a rebuild reuses; what is refused."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from calib.data import Examples
from calib.quality import evaluate
from compexport.errors import InputError
from engines.bundle import Bundle
from engines.manifest import EXIT_OUTPUTS, Variant, backbones
from engines.runtime import Runtime
from exporter import family
from exporter.backbone import Backbone, load_backbone
from exporter.checkpoint import find_checkpoint, save_checkpoint
from exporter.methods.costeff import CosteffModel
from exporter.methods.costeff_checkpoint import load_model, stored_tensors
from exporter.methods.slender import SlenderShape
from exporter.plans.costeff import CosteffPlan, checked_exits, default_exits
from tests import models
from tests.exporter.test_costeff import feeds, random_model
from tests.exporter.test_family import ROOT, contents, plain_session
from tests.traces import Traces

CLASSIFIER = "sequence-classification"
DEEP, DEPTH = "tiny-bert-deep", 4
NARROW = SlenderShape((1, 3, 2, 4), (9, 64, 1, 20), 10)
EXITS = {1: (2, 4), 2.5: (1, 3, 4)}

Arrays = dict[str, np.ndarray]
Built = Callable[..., Path]


def with_exits(backbone: Backbone, seed: int = 0) -> CosteffModel:
    """The backbone itself, with exits that differ from each other."""
    model = CosteffModel.from_backbone(backbone)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".highway." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def save(folder: Path, backbone: Backbone, models_: dict[float, CosteffModel]) -> None:
    settings = {"shapes": {str(ratio): model.shape.document() for ratio, model in models_.items()}}
    tensors = {ratio: stored_tensors(model, backbone) for ratio, model in models_.items()}
    save_checkpoint(folder, backbone.folder, "costeff", settings, tensors)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, backbone: Callable[..., Backbone]) -> Path:
    """Exits on the backbone at ratio 1; at ratio 2.5 a model of other widths in every layer. Do not write into it."""
    loaded = backbone(DEEP, CLASSIFIER)
    folder = tmp_path_factory.mktemp("costeff") / "checkpoint"
    save(folder, loaded, {1: with_exits(loaded), 2.5: random_model(loaded, NARROW)})
    return folder


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory, checkpoint: Path, trace_memory: Traces) -> Path:
    """Both ratios of ``checkpoint`` with prefixes. Do not write into it."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        trace_memory.replace(patch)
        family.build(checkpoint, [2.5], folder, exits=EXITS, prefixes=True)
    return folder


def as_arrays(tensors: dict[str, torch.Tensor]) -> Arrays:
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def run(folder: Path, graph: str, feed: Arrays, *, engine: bool = False) -> Arrays:
    """One graph or engine of a bundle, as any user of ONNX Runtime would run it."""
    found = Bundle.open(folder).manifest
    paths = (
        {e.graph: e.path for e in found.engines.values()} if engine else {n: g.path for n, g in found.graphs.items()}
    )
    session = plain_session(folder / paths[graph])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feed), strict=True))


def chain(
    folder: Path, variant: Variant, feed: Arrays, rows: list[np.ndarray], *, engine: bool = False
) -> list[Arrays]:
    """The outputs of all segments; before each but the first, ``rows`` of what is left."""
    outputs = [run(folder, variant.graphs["segment-0"], feed, engine=engine)]
    mask = feed["attention_mask"]
    for index in range(1, len(variant.exits or ())):
        kept = rows[index - 1]
        given = {"previous": outputs[-1]["hidden"], "attention_mask": mask, "rows": kept}
        outputs.append(run(folder, variant.graphs[f"segment-{index}"], given, engine=engine))
        mask = mask[kept]
    return outputs


# --- what is computed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [False, True], ids=["graph", "engine"])
@pytest.mark.parametrize("ratio", [1, 2.5])
def test_prefixes_and_segments_and_all_exits_agree(bundle: Path, checkpoint: Path, ratio: float, engine: bool) -> None:
    """Property 4 of methods.md 2g, and the same in PyTorch."""
    variant = Bundle.open(bundle).manifest.variants[f"costeff-r{ratio}-fp32"]
    assert tuple(variant.exits or ()) == EXITS[ratio]
    loaded, found = load_backbone(checkpoint), find_checkpoint(checkpoint)
    assert found is not None
    model = load_model(found, loaded, ratio)
    for lengths in [(9, 5, 1), (1,), (31, 2), (160, 7)]:
        tensors = feeds(loaded, lengths)
        with torch.no_grad():
            expected = torch.stack(model(**tensors).logits, 1).numpy()
        feed = as_arrays(tensors)
        every = run(bundle, variant.graphs["all-exits"], feed, engine=engine)
        np.testing.assert_allclose(every["logits"], expected, atol=1e-5, rtol=0)
        steps = chain(bundle, variant, feed, [np.arange(len(lengths))] * DEPTH, engine=engine)
        for layer, step in zip(EXITS[ratio], steps, strict=True):
            prefix = run(bundle, variant.graphs[f"prefix-{layer}"], feed, engine=engine)
            assert list(prefix) == list(EXIT_OUTPUTS)
            assert set(step) - set(EXIT_OUTPUTS) == (set() if layer == DEPTH else {"hidden"})
            for name in EXIT_OUTPUTS:
                np.testing.assert_allclose(prefix[name], every[name][:, layer - 1], atol=1e-5, rtol=0)
                np.testing.assert_allclose(step[name], every[name][:, layer - 1], atol=1e-5, rtol=0)
    assert np.abs(np.diff(expected, axis=1)).min() > 1e-3, "exits say the same: the comparison would be empty"


@pytest.mark.parametrize("ratio", [1, 2.5])
def test_rows_that_leave_change_nothing_for_those_that_stay(bundle: Path, checkpoint: Path, ratio: float) -> None:
    variant = Bundle.open(bundle).manifest.variants[f"costeff-r{ratio}-fp32"]
    feed = as_arrays(feeds(load_backbone(checkpoint), (9, 5, 1, 7, 3)))
    every = run(bundle, variant.graphs["all-exits"], feed)["logits"]
    kept = [np.array([4, 1, 0]), np.array([2, 0])]
    left = np.arange(5)
    for layer, step, rows in zip(EXITS[ratio], chain(bundle, variant, feed, kept), [None, *kept], strict=False):
        left = left if rows is None else left[rows]
        np.testing.assert_allclose(step["logits"], every[left, layer - 1], atol=1e-5, rtol=0)


def test_statistics_of_sure_and_unsure_exits(bundle: Path, checkpoint: Path) -> None:
    feed = as_arrays(feeds(load_backbone(checkpoint), (9, 5, 1)))
    found = run(bundle, "costeff-r2.5-all", feed)
    logits = found["logits"].astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = np.sort(p / p.sum(-1, keepdims=True))
    np.testing.assert_allclose(found["entropy"], -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(found["max_probability"], p[..., -1], atol=1e-5)
    np.testing.assert_allclose(found["margin"], p[..., -1] - p[..., -2], atol=1e-5)
    assert all(found[name].dtype == np.float32 for name in EXIT_OUTPUTS)


@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-electra", "tiny-distilbert"])
def test_every_host(tiny: Callable[..., Path], name: str, traces: Traces, tmp_path: Path) -> None:
    """Ratio 1 is the Hugging Face model; ratio 2, untrained, has an exit after both of its layers."""
    model = tiny(name, CLASSIFIER)
    built = family.build(model, [2], tmp_path / "bundle", method="costeff", untrained=True, exits={2: (1, 2)})
    loaded = load_backbone(model)
    feed = feeds(loaded, (9, 4))
    with torch.no_grad():
        expected = loaded.model(**feed).logits.numpy()
    np.testing.assert_allclose(run(built.bundle, "costeff-r1", as_arrays(feed))["logits"], expected, atol=1e-5, rtol=0)
    variant = built.manifest.variants["costeff-r2-fp32"]
    every = run(built.bundle, "costeff-r2-all", as_arrays(feed))["logits"]
    for index, step in enumerate(chain(built.bundle, variant, as_arrays(feed), [np.arange(2)])):
        np.testing.assert_allclose(step["logits"], every[:, index], atol=1e-5, rtol=0)


# --- what is written ----------------------------------------------------------------------------------------------


def test_manifest(bundle: Path, checkpoint: Path) -> None:
    manifest = Bundle.open(bundle).manifest
    loaded = load_backbone(checkpoint)
    whole, narrow = (manifest.variants[f"costeff-r{ratio}-fp32"] for ratio in (1, 2.5))
    assert manifest.method == "costeff" and list(manifest.variants) == ["costeff-r1-fp32", "costeff-r2.5-fp32"]
    assert (whole.ratio, narrow.ratio) == (1, 2.5) and not (whole.untrained or narrow.untrained)
    assert narrow.graphs == {
        **{f"segment-{i}": f"costeff-r2.5-s{i}" for i in range(3)},
        "all-exits": "costeff-r2.5-all",
        **{f"prefix-{layer}": f"costeff-r2.5-p{layer}" for layer in (1, 3, 4)},
    }
    assert narrow.settings == {**NARROW.document(), "pooler_dense": False, "highway_dense": False, "mean": False}
    exits = (DEPTH - 1) * (models.HIDDEN + 1) * 2
    assert whole.extra_params == exits and whole.params == loaded.params + exits
    assert narrow.extra_params == narrow.params < loaded.params
    assert 0.9 < whole.flops_ratio < 1 < narrow.flops_ratio
    for variant in (whole, narrow):
        parts = [manifest.graphs[variant.graphs[f"segment-{i}"]] for i in range(len(variant.exits or ()))]
        for layer, count in zip(variant.exits or (), range(1, len(parts) + 1), strict=True):
            prefix = manifest.graphs[variant.graphs[f"prefix-{layer}"]].cost.macs(50)
            heads = sum(part.cost.fixed for part in parts[: count - 1])
            assert sum(part.cost.macs(50) for part in parts[:count]) == prefix + heads
        assert all(graph.parity.max_abs <= 1e-5 for graph in parts)
    shapes = {spec.name: spec.shape for spec in manifest.graphs["costeff-r2.5-s1"].inputs}
    assert shapes == {
        "previous": ["batch", "sequence", models.HIDDEN],
        "attention_mask": ["batch", "sequence"],
        "rows": ["kept"],
    }
    ends = {spec.name: spec.shape for spec in manifest.graphs["costeff-r2.5-s1"].outputs}
    assert ends["hidden"] == ["kept", "sequence", models.HIDDEN] and ends["entropy"] == ["kept"]
    assert {spec.name: spec.shape for spec in manifest.graphs["costeff-r2.5-all"].outputs} == {
        "logits": ["batch", DEPTH, 2],
        **{name: ["batch", DEPTH] for name in EXIT_OUTPUTS[1:]},
    }


def test_no_tensor_is_stored_twice(bundle: Path) -> None:
    places: dict[tuple[int, int], set[str]] = {}
    for path in sorted((bundle / "graphs").glob("*.onnx")):
        for tensor in onnx.load(path, load_external_data=False).graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            if where:
                places.setdefault((int(where["offset"]), int(where["length"])), set()).add(path.name)
    data = (bundle / "graphs" / "weights.bin").read_bytes()
    found = [hashlib.sha256(data[offset : offset + length]).hexdigest() for offset, length in places]
    assert len(found) == len(set(found)) > 20
    assert all(start + length <= following for (start, length), (following, _) in pairwise(sorted(places)))
    assert sum(len(names) > 1 for names in places.values()) > len(places) / 2  # shared by parts of a ratio


def test_a_backbone_without_exits_is_one_graph(tiny: Callable[..., Path], traces: Traces, tmp_path: Path) -> None:
    model = tiny(DEEP, CLASSIFIER)
    made = family.build(model, [2], tmp_path / "bundle", method="costeff", untrained=True, seed=3)
    whole, narrow = made.manifest.variants.values()
    assert whole.graphs == {"encoder": "costeff-r1"} and whole.exits is None and not whole.untrained
    assert (whole.params, whole.extra_params, whole.flops_ratio) == (load_backbone(model).params, 0, 1)
    assert narrow.untrained and narrow.exits == [1, 2, 3, 4]
    document = json.loads((made.bundle / "manifest.json").read_text())
    assert ["exits" in variant for variant in document["variants"].values()] == [False, True]
    row = made.document()["variants"][1]
    assert row["parity_max_abs"] == max(g.parity.max_abs for n, g in made.manifest.graphs.items() if "-r2-" in n)


# --- rebuilding ---------------------------------------------------------------------------------------------------


def test_nothing_changed_imports_nothing_heavy(bundle: Path, checkpoint: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    before = contents(copy)
    code = (
        "import json, sys\n"
        "from exporter.family import build\n"
        "report = build(sys.argv[1], [2.5], sys.argv[2], exits={1: (2, 4), 2.5: (1, 3, 4)}, prefixes=True)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & sys.modules.keys()\n"
        "print(json.dumps([sorted(heavy), [row['reused'] for row in report.document()['variants']]]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint), str(copy)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], [True, True]]
    assert contents(copy) == before


def test_other_exits_rebuild_only_what_changed(bundle: Path, checkpoint: Path, traces: Traces, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    # Segment 1-3 of ratio 2.5 splits; 3-4 keeps its content under another name.
    report = family.build(checkpoint, [2.5], copy, exits={1: (2, 4), 2.5: (1, 2, 3, 4)}, prefixes=True)
    made = set(report.manifest.graphs) - report.reused
    assert made == {"costeff-r2.5-s1", "costeff-r2.5-s2", "costeff-r2.5-p2"}
    assert len(traces.calls) == 1
    moved = report.manifest.graphs["costeff-r2.5-s3"]
    assert moved.path == "graphs/costeff-r2.5-s3.onnx" and "costeff-r2.5-s3" in report.reused
    feed = as_arrays(feeds(load_backbone(checkpoint), (9, 5)))
    variant = report.manifest.variants["costeff-r2.5-fp32"]
    steps = chain(copy, variant, feed, [np.arange(2)] * DEPTH)
    every = run(copy, variant.graphs["all-exits"], feed)["logits"]
    np.testing.assert_allclose(np.stack([step["logits"] for step in steps], 1), every, atol=1e-5, rtol=0)
    traces.calls.clear()
    fewer = family.build(checkpoint, [2.5], copy, exits={1: (2, 4), 2.5: (1, 2, 3, 4)})
    assert set(fewer.manifest.graphs) == fewer.reused == {n for n in report.manifest.graphs if "-p" not in n}
    assert traces.calls == []


def test_new_tensors_rebuild_their_ratio_only(
    bundle: Path, checkpoint: Path, backbone: Callable[..., Backbone], traces: Traces, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    loaded = backbone(DEEP, CLASSIFIER)
    save(model, loaded, {2.5: random_model(loaded, SlenderShape.uniform(DEPTH, 2, 30, None), seed=1)})
    found = find_checkpoint(model)
    assert found is not None and found.ratios == [1, 2.5] and found.settings["shapes"].keys() == {"1", "2.5"}
    report = family.build(model, [2.5], copy, exits=EXITS, prefixes=True)
    assert {name for name in report.manifest.graphs if "-r1-" in name} == report.reused


# --- checkpoints --------------------------------------------------------------------------------------------------


def test_a_file_of_exits_holds_nothing_else(checkpoint: Path) -> None:
    found = find_checkpoint(checkpoint)
    assert found is not None and found.files == {1: "costeff-r1.safetensors", 2.5: "costeff-r2.5.safetensors"}
    assert all(name.startswith("bert.encoder.highway.") for name in found.load(1))
    loaded = load_backbone(checkpoint)
    feed = feeds(loaded)
    with torch.no_grad():
        assert torch.equal(
            load_model(found, loaded, 1)(**feed).logits[-1], CosteffModel.from_backbone(loaded)(**feed).logits[-1]
        )


@pytest.mark.parametrize(
    ("pooled", "mean"), [(True, False), (False, False), (False, True)], ids=["dense pooler", "no pooler", "mean"]
)
def test_jointly_trained_exits_bring_their_own_head(
    backbone: Callable[..., Backbone], tmp_path: Path, traces: Traces, pooled: bool, mean: bool
) -> None:
    """Ratio 1 with other weights than the backbone's is what it was when saved; the backbone stands beside it."""
    loaded = backbone(DEEP, CLASSIFIER)
    whole = random_model(loaded, SlenderShape.full(loaded), pooler_dense=pooled, mean=mean)
    save(tmp_path / "model", loaded, {1: whole})
    made = family.build(tmp_path / "model", [], tmp_path / "bundle", exits={1: (2, 4)})
    feed = feeds(loaded)
    with torch.no_grad():
        expected = torch.stack(whole(**feed).logits, 1).numpy()
    np.testing.assert_allclose(run(made.bundle, "costeff-r1-all", as_arrays(feed))["logits"], expected, atol=1e-5)
    variants = made.manifest.variants
    assert list(variants) == ["backbone-fp32", "costeff-r1-fp32"] and backbones(variants)[0] == "backbone-fp32"
    assert variants["costeff-r1-fp32"].extra_params > loaded.params / 2
    plain = variants["backbone-fp32"]
    assert (plain.params, plain.extra_params, plain.flops_ratio, plain.exits) == (loaded.params, 0, 1, None)
    with torch.no_grad():
        answers = loaded.model(**feed).logits.numpy()
    np.testing.assert_allclose(run(made.bundle, "backbone", as_arrays(feed))["logits"], answers, atol=1e-5)
    assert np.abs(answers - expected[:, -1]).max() > 1e-3
    with Runtime.open(made.bundle) as runtime:
        found = evaluate(runtime, Examples(models.TEXTS)).table
    assert found["backbone_variant"] == "backbone-fp32" and found["variants"]["backbone-fp32"] == 1


# --- bad input ----------------------------------------------------------------------------------------------------


def refusal(*arguments: Any, **options: Any) -> str:
    with pytest.raises(InputError) as caught:
        family.build(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_models(tiny: Callable[..., Path], checkpoint: Path, tmp_path: Path) -> None:
    model = tiny(DEEP, CLASSIFIER)
    message = refusal(model, [2, 2.5], tmp_path / "bundle", method="costeff")
    assert message.startswith(f"{model}: no trained slender model for ratio 2,2.5: got a bare model; ")
    assert f"compexport train costeff {model} --ratio 2,2.5 --data TEXTS -o OUT" in message
    assert "for ratio 8: got ratios [1, 2.5]; " in refusal(checkpoint, [8], tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_method(official: Path, checkpoint: Path, tmp_path: Path) -> None:
    wrong = "a checkpoint of another method: got "
    assert f"{wrong}variator, expected costeff" in refusal(official, [2], tmp_path / "bundle", method="costeff")
    assert f"{wrong}costeff, expected variator" in refusal(checkpoint, [2], tmp_path / "bundle", method="variator")
    with pytest.raises(InputError, match=f"{wrong}costeff, expected variator"):
        save_checkpoint(checkpoint, checkpoint, "variator", {}, {})


def test_a_model_that_does_not_classify(tiny: Callable[..., Path], tmp_path: Path) -> None:
    message = refusal(tiny(DEEP), [2], tmp_path / "bundle", method="costeff", untrained=True)
    assert "got a model for feature-extraction, expected sequence-classification" in message
    assert "does not fit this architecture: got 't5'" in refusal(
        tiny("tiny-t5", "label-words"), [2], tmp_path / "bundle", method="costeff", untrained=True
    )


def test_widths_that_do_not_match_the_tensors(checkpoint: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    description = model / "compexport.json"
    document = json.loads(description.read_text())
    document["settings"]["shapes"]["2.5"]["neurons"][0] += 1
    description.write_text(json.dumps(document))
    assert "widths of ratio 2.5" in refusal(model, [2.5], tmp_path / "bundle")


@pytest.mark.parametrize("ratio", ["zwei", "0.5", "nan", "inf"])
def test_a_description_with_a_wrong_ratio(checkpoint: Path, tmp_path: Path, ratio: str) -> None:
    model = Path(shutil.copytree(checkpoint, tmp_path / "model"))
    description = model / "compexport.json"
    document = json.loads(description.read_text())
    document["files"][ratio] = document["files"].pop("2.5")
    description.write_text(json.dumps(document))
    assert "compexport.json: unreadable" in refusal(model, [2], tmp_path / "bundle")


@pytest.mark.parametrize(
    ("exits", "message"),
    [
        ([2, 9], "--exits beyond the depth: got 9, expected 1 to 6"),
        ([4, 2], "--exits must rise: got 4,2, expected each layer once, like 2,4,6"),
        ([2, 2], "--exits must rise: got 2,2"),
        ([0, 2], "--exits are layers counted from 1: got 0, expected 1 to 6"),
        ([-1], "--exits are layers counted from 1: got -1"),
        ([2.5], "--exits are whole layers: got 2.5"),
        ([float("nan")], "--exits are whole layers: got nan"),
        ([], "--exits must rise: got none"),
    ],
)
def test_wrong_exits(exits: list[float], message: str) -> None:
    with pytest.raises(InputError) as caught:
        checked_exits(exits, 6)
    assert str(caught.value).startswith(message)


def test_exits() -> None:
    assert checked_exits([2, 4], 6) == (2, 4, 6)
    assert checked_exits([6], 6) == (6,)
    assert [default_exits(depth) for depth in (1, 2, 4, 6, 12)] == [
        (1,),
        (1, 2),
        (1, 2, 3, 4),
        (2, 3, 5, 6),
        (3, 6, 9, 12),
    ]


def test_names_of_a_plan(checkpoint: Path) -> None:
    plan = CosteffPlan(checkpoint, (1, 2.5), find_checkpoint(checkpoint), exits={2.5: (4,)})
    assert list(plan.keys()) == [
        *(f"costeff-r1-{part}" for part in ("s0", "s1", "s2", "s3", "all")),
        "costeff-r2.5-s0",
        "costeff-r2.5-all",
    ]
    assert plan.roles(2.5) == {"segment-0": "costeff-r2.5-s0", "all-exits": "costeff-r2.5-all"}
    assert not plan.keeps_backbone and list(plan.variants()) == ["costeff-r1-fp32", "costeff-r2.5-fp32"]


def test_the_backbone_is_kept_beside_another_model_of_ratio_1(
    backbone: Callable[..., Backbone], tmp_path: Path
) -> None:
    loaded = backbone(DEEP, CLASSIFIER)
    save(tmp_path / "joint", loaded, {1: random_model(loaded, SlenderShape.full(loaded))})
    plan = CosteffPlan(tmp_path / "joint", (1,), find_checkpoint(tmp_path / "joint"), exits={1: (4,)})
    assert plan.variants() == {
        "backbone-fp32": {"encoder": "backbone"},
        "costeff-r1-fp32": {"segment-0": "costeff-r1-s0", "all-exits": "costeff-r1-all"},
    }
    assert list(plan.keys()) == ["backbone", "costeff-r1-s0", "costeff-r1-all"]
