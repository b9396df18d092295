"""Building a family: every host, every task, both pad modes; what a rebuild reuses; what a failure leaves."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from compexport.errors import InputError, ParityError
from engines import backends
from engines.bundle import Bundle
from exporter import parity
from exporter.backbone import Backbone
from exporter.checkpoint import MethodCheckpoint, save_checkpoint
from exporter.family import build
from exporter.methods.variator import VariatorModel, VariatorPlugins, output_names
from tests import models
from tests.exporter.conftest import RATIOS, random_plugins
from tests.traces import Traces

ROOT = Path(__file__).parents[2]
PREFIX = "variator.plugins."
FAMILIES = [
    *((name, "feature-extraction", "masked") for name in models.MODELS),
    *(("tiny-bert", task, "masked") for task in models.HEAD_CLASSES if task != "feature-extraction"),
    *((name, "label-words", "masked") for name in models.MODELS if "label-words" in models.MODELS[name].classes),
    ("tiny-bert", "feature-extraction", "official"),
    ("tiny-t5", "label-words", "official"),
]


def contents(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def plain_session(path: Path) -> onnxruntime.InferenceSession:
    """As any user of ONNX Runtime would open a graph."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def stored_plugins(path: Path, backbone: Backbone, pad: Any) -> VariatorPlugins:
    """The plugins inside a graph."""
    model = onnx.load(path)
    tensors = {
        tensor.name.removeprefix(PREFIX): torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in model.graph.initializer
        if tensor.name.startswith(PREFIX)
    }
    return VariatorPlugins.from_tensors(tensors, backbone.hidden_size, backbone.num_layers, pad, path.name)


def feed(backbone: Backbone, batch: int, length: int) -> dict[str, np.ndarray]:
    """Random ids; in a batch, the texts have different lengths."""
    generator = np.random.default_rng(length)
    pad_id = backbone.config.pad_token_id
    real = np.maximum(1, length - np.arange(batch) * max(1, length // 3))
    mask = (np.arange(length) < real[:, None]).astype(np.int64)
    ids = np.where(mask == 1, generator.integers(5, backbone.config.vocab_size, (batch, length)), pad_id)
    made = {"input_ids": ids, "attention_mask": mask, "token_type_ids": generator.integers(0, 2, ids.shape) * mask}
    return {name: made[name] for name in backbone.input_names}


@pytest.mark.parametrize(("name", "task", "pad"), FAMILIES, ids=["-".join(entry) for entry in FAMILIES])
def test_graphs_and_engines_equal_eager(
    name: str, task: str, pad: str, built: Callable[..., Path], backbone: Callable[..., Backbone]
) -> None:
    bundle = Bundle.open(built(name, task, pad))
    loaded = backbone(name, task)
    model = VariatorModel(loaded).eval()
    engines = backends.load("ort").open_sessions(bundle, threads=1)
    for ratio in (1, *RATIOS):
        graph = bundle.path / "graphs" / f"r{ratio}.onnx"
        session = plain_session(graph)
        engine = engines[f"variator-r{ratio}-fp32"]
        plugins = None if ratio == 1 else stored_plugins(graph, loaded, pad)
        effects = []
        for length in sorted({1, ratio - 1, ratio, ratio + 1, 3 * ratio, 3 * ratio + 1} - {0}):
            for batch in (1, 3):
                feeds = feed(loaded, batch, length)
                model.variator.detach()
                plain = _eager(model, feeds)
                if plugins is not None:
                    model.variator.attach(plugins)
                expected = _eager(model, feeds)
                got = session.run(list(output_names(loaded)), feeds)
                also = engine.run(feeds)
                assert list(also) == list(output_names(loaded))
                for want, one, two in zip(expected, got, also.values(), strict=True):
                    np.testing.assert_allclose(one, want, atol=1e-5, rtol=0)
                    np.testing.assert_allclose(two, want, atol=1e-4, rtol=0)
                effects.append(max(np.abs(a - b).max() for a, b in zip(plain, expected, strict=True)))
        assert ratio == 1 or max(effects) > 1e-2, "the plugins do nothing: the comparison would be empty"


def _eager(model: VariatorModel, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    with torch.no_grad():
        return [t.numpy() for t in model(**{key: torch.from_numpy(array) for key, array in feeds.items()})]


# --- what is written ----------------------------------------------------------------------------------------------


def test_manifest(built: Callable[..., Path], backbone: Callable[..., Backbone]) -> None:
    manifest = Bundle.open(built("tiny-bert")).manifest
    bert = backbone()
    assert (manifest.method, manifest.task, manifest.pooling) == ("variator", "feature-extraction", "mean+normalize")
    assert manifest.backbone.sha256 == bert.sha256
    assert manifest.tokenizer is not None and manifest.tokenizer.max_length == models.MAX_LENGTH
    assert list(manifest.variants) == [f"variator-r{ratio}-fp32" for ratio in (1, *RATIOS)]
    for name, variant in manifest.variants.items():
        assert variant.untrained == (variant.ratio != 1)
        assert variant.params == bert.params + variant.extra_params
        assert (variant.flops_ratio == 1) == (variant.ratio == 1)
        found = manifest.graphs[variant.graphs["encoder"]].parity
        assert 0 <= found.max_abs <= found.tolerance == 1e-4, name
        k = int(variant.ratio)
        lengths = {1, k - 1, k, k + 1, 3 * k + 1, 128} - {0}
        assert sorted(found.shapes) == sorted((batch, length) for batch in (1, 3) for length in lengths)


def test_trained_plugins_are_not_flagged(built: Callable[..., Path], backbone: Callable[..., Backbone]) -> None:
    bundle = Bundle.open(built(pad="official"))
    assert not any(variant.untrained for variant in bundle.manifest.variants.values())
    for ratio in RATIOS:
        variant = bundle.manifest.variants[f"variator-r{ratio}-fp32"]
        assert variant.settings == {"pad": "official", "width": 5, "k": ratio}
        stored = stored_plugins(bundle.path / "graphs" / f"r{ratio}.onnx", backbone(), "official")
        fitted = random_plugins(backbone(), ratio, "official").state_dict()
        assert all(torch.equal(tensor, fitted[name]) for name, tensor in stored.state_dict().items())


def test_weights_file_holds_every_backbone_tensor_once(
    built: Callable[..., Path], backbone: Callable[..., Backbone]
) -> None:
    data = (built("tiny-bert") / "graphs" / "weights.bin").read_bytes()
    tensors = [t.numpy() for t in backbone().encoder.state_dict().values() if t.numel() * 4 >= 1024]
    looked_for = 0
    for tensor in tensors:
        forms = {tensor.tobytes(), np.ascontiguousarray(tensor.T).tobytes()}
        found = sum(data.count(form) for form in forms)
        if found:
            looked_for += 1
        assert found <= 1
    assert looked_for >= len(tensors) - 1  # the pooler's weights, which nobody reads, are left out
    used = sum(len(set_of.tobytes()) for set_of in tensors)
    plugins = sum(variant.extra_params for variant in Bundle.open(built("tiny-bert")).manifest.variants.values()) * 4
    assert len(data) <= used + plugins + 4096 * 80


# --- failures -----------------------------------------------------------------------------------------------------


def test_a_parity_failure_leaves_nothing(
    tiny: Callable[..., Path], traces: Traces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(parity.TOLERANCE, "fp32", -1.0)
    with pytest.raises(ParityError, match="the graph differs from PyTorch"):
        build(tiny("tiny-bert"), [2], tmp_path / "bundle", untrained=True)
    assert list(tmp_path.iterdir()) == []


def test_a_parity_failure_keeps_the_old_bundle(
    tiny: Callable[..., Path],
    built: Callable[..., Path],
    traces: Traces,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Path(shutil.copytree(built("tiny-bert"), tmp_path / "bundle"))
    before = contents(old)
    monkeypatch.setitem(parity.TOLERANCE, "fp32", -1.0)
    with pytest.raises(ParityError):
        build(tiny("tiny-bert"), [3], old, untrained=True)
    assert contents(old) == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_missing_plugins(tiny: Callable[..., Path], official: Path, tmp_path: Path) -> None:
    model = tiny("tiny-bert")
    with pytest.raises(InputError) as caught:
        build(model, [2, 4], tmp_path / "bundle")
    message = str(caught.value)
    assert message.startswith(f"{model}: no trained plugins for ratio 2,4: got a bare model; ")
    assert f"compexport train variator {model} --ratio 2,4 --data TEXTS -o OUT" in message
    assert "--untrained" in message
    with pytest.raises(InputError, match=r"no trained plugins for ratio 8: got ratios \[2, 4\]; "):
        build(official, [2, 8], tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_no_bundle_is_kept(tiny: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("keep me")
    with pytest.raises(InputError, match="notes"):
        build(tiny("tiny-bert"), [2], tmp_path / "notes", untrained=True)
    assert list(contents(tmp_path)) == ["notes/todo.txt"]


def test_plugins_under_the_wrong_ratio(
    official: Path, backbone: Callable[..., Backbone], traces: Traces, tmp_path: Path
) -> None:
    """A description that gives ratio 2's file for ratio 4."""
    model = Path(shutil.copytree(official, tmp_path / "model"))
    path = model / "compexport.json"
    document = json.loads(path.read_text())
    document["files"]["4"] = document["files"]["2"]
    path.write_text(json.dumps(document))
    with pytest.raises(InputError, match="ratio 4"):
        build(model, [4], tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_official_and_untrained_plugins_together(official: Path, traces: Traces, tmp_path: Path) -> None:
    """Trained official plugins at ratio 4, random ones at ratio 3: each graph equals its own reference."""
    report = build(official, [3, 4], tmp_path / "bundle", untrained=True)
    variants = report.manifest.variants
    assert [v.untrained for v in variants.values()] == [False, True, False]
    assert variants["variator-r4-fp32"].settings["pad"] == "official"


def test_large_official_ratios_keep_the_models_length(
    tiny: Callable[..., Path], backbone: Callable[..., Backbone]
) -> None:
    """Ratios 3, 7 and 8 pad 159 tokens to at most 160; their least common multiple has no say in it."""
    from exporter.graphs.variator import VariatorFamily
    from exporter.plans.variator import VariatorPlan

    plugins = {ratio: random_plugins(backbone(), ratio, "official") for ratio in (3, 7, 8)}
    family = VariatorFamily(VariatorPlan(tiny("tiny-bert"), (1, 3, 7, 8), None, untrained=True), backbone(), plugins)
    assert family.tokenizer("tokenizer.json").max_length >= 150


# --- rebuilding ---------------------------------------------------------------------------------------------------


def test_nothing_changed_reuses_everything_and_imports_nothing_heavy(
    tiny: Callable[..., Path], built: Callable[..., Path], tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(built("tiny-bert"), tmp_path / "bundle"))
    before = contents(bundle)
    code = (
        "import json, sys\n"
        "from exporter.family import build\n"
        "report = build(sys.argv[1], [2, 4], sys.argv[2], untrained=True)\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime'} & sys.modules.keys()\n"
        "print(json.dumps([sorted(heavy), [row['reused'] for row in report.document()['variants']]]))\n"
    )
    command = [sys.executable, "-c", code, str(tiny("tiny-bert")), str(bundle)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [[], [True, True, True]]
    assert contents(bundle) == before


def test_adding_and_removing_a_ratio(
    tiny: Callable[..., Path], built: Callable[..., Path], traces: Traces, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(built("tiny-bert"), tmp_path / "bundle"))
    first = Bundle.open(bundle).manifest
    added = build(tiny("tiny-bert"), [2, 3, 4], bundle, untrained=True)
    assert added.reused == {"r1", "r2", "r4"}
    assert {name: added.manifest.graphs[name] for name in added.reused} == first.graphs
    grown = sum(entry.size_bytes for entry in added.manifest.files.values())
    traces.calls.clear()
    removed = build(tiny("tiny-bert"), [4], bundle, untrained=True)
    assert traces.calls == []
    assert removed.reused == {"r1", "r4"}
    assert list(removed.manifest.variants) == ["variator-r1-fp32", "variator-r4-fp32"]
    assert sorted(path.name for path in (bundle / "graphs").iterdir()) == ["r1.onnx", "r4.onnx", "weights.bin"]
    assert sum(entry.size_bytes for entry in removed.manifest.files.values()) < grown
    # What is left still works, and says the same as before.
    ids = np.full((1, 9), 7)
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    runs = [
        backends.load("ort").open_sessions(Bundle.open(folder), ["variator-r4-fp32"], threads=1)["variator-r4-fp32"]
        for folder in (built("tiny-bert"), bundle)
    ]
    one, two = (session.run(feeds)["last_hidden_state"] for session in runs)
    np.testing.assert_array_equal(one, two)


def test_changed_weights_and_another_seed_rebuild(built: Callable[..., Path], traces: Traces, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(built("tiny-bert"), tmp_path / "bundle"))
    other = models.make("tiny-bert", tmp_path / "other", seed=1)
    report = build(other, RATIOS, bundle, untrained=True)
    assert report.reused == set()
    assert report.manifest.backbone.sha256 != Bundle.open(built("tiny-bert")).manifest.backbone.sha256
    assert contents(bundle)["graphs/weights.bin"] != contents(built("tiny-bert"))["graphs/weights.bin"]
    again = build(other, RATIOS, bundle, untrained=True, seed=5)
    assert again.reused == {"r1"}


def test_new_plugins_rebuild_their_ratio_only(
    official: Path, built: Callable[..., Path], backbone: Callable[..., Backbone], traces: Traces, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(official, tmp_path / "model"))
    bundle = Path(shutil.copytree(built(pad="official"), tmp_path / "bundle"))
    refitted = random_plugins(backbone(), 4, "official", seed=1).state_dict()
    found: MethodCheckpoint = save_checkpoint(model, model, "variator", {}, {4: refitted})
    assert found.ratios == [2, 4]
    assert build(model, RATIOS, bundle).reused == {"r1", "r2"}


@pytest.mark.parametrize("file", ["graphs/weights.bin", "graphs/r4.onnx", "engines/ort-cpu/weights.bin"])
def test_a_damaged_bundle_is_repaired(
    tiny: Callable[..., Path], built: Callable[..., Path], traces: Traces, tmp_path: Path, file: str
) -> None:
    bundle = Path(shutil.copytree(built("tiny-bert"), tmp_path / "bundle"))
    before = contents(bundle)
    data = bytearray((bundle / file).read_bytes())
    data[-1] ^= 1
    (bundle / file).write_bytes(data)
    build(tiny("tiny-bert"), RATIOS, bundle, untrained=True)
    assert Bundle.open(bundle).verify() == []
    assert contents(bundle)[file] == before[file]
