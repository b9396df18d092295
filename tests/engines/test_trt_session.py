"""Every kind of variant, run by the TensorRT session over doubles of NVIDIA's library and of CUDA, on the processor.

What is shown is that our code asks both for the right things in the right order: results are those of ONNX Runtime.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from compexport.errors import BundleError, InputError
from engines import causal
from engines.backends import ort, trt
from engines.backends.trt_options import PlanOptions, Range
from engines.backends.trt_product import TENSORRT_RTX
from engines.backends.trt_session import PlanSession
from engines.bundle import Bundle
from engines.bundle_manifest import seal_of
from engines.bundle_reader import sha256_of
from engines.runtime import Runtime
from tests.engines import decoders, exits, plans
from tests.engines.plan_checks import (
    CASCADES,
    ENCODERS,
    WAYS,
    check_exits,
    check_logits,
    check_texts,
    check_variants,
    close_all,
    generators,
    make,
)
from tests.engines.plans import Machine

TOLERANCE = 2e-5


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine on which at the end nothing is left open."""
    there = plans.machine(monkeypatch)
    yield there
    assert not any(there.cuda.left.values()), there.cuda.left


def planned(name: str, folder: Path) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        return plans.with_plans(make(name, folder), plans.machine(patch))


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``bundles(name)``: one of the bundles with plans, made once."""
    there: dict[str, Bundle] = {}

    def bundle(name: str) -> Bundle:
        if name not in there:
            there[name] = planned(name, tmp_path_factory.mktemp("plans") / name.replace(" ", "-"))
        return there[name]

    return bundle


@pytest.mark.parametrize("kind", ENCODERS)
def test_variants_say_what_ort_says(bundles: Any, gpu: Machine, kind: str) -> None:
    check_variants(bundles(kind), gpu.backend(), TOLERANCE)


@pytest.mark.parametrize("kind", CASCADES)
def test_rows_leave_where_they_leave_with_ort(bundles: Any, gpu: Machine, kind: str) -> None:
    check_exits(bundles(kind), gpu.backend(), TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_texts_are_those_of_ort(bundles: Any, gpu: Machine, way: str) -> None:
    check_texts(bundles("decoders"), gpu.backend(), way)


@pytest.mark.parametrize("kind", ["decoders", "decoders that keep halves"])
def test_logits_are_those_of_ort(bundles: Any, gpu: Machine, kind: str) -> None:
    check_logits(bundles(kind), gpu.backend(), TOLERANCE)


def test_rtx_runs_the_same_way(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    there = plans.machine(monkeypatch, TENSORRT_RTX)
    bundle = plans.with_plans(make("steps with exits", tmp_path / "bundle"), there)
    check_variants(bundle, there.backend(), TOLERANCE)
    assert not any(there.cuda.left.values())


def test_stripped_plans_get_their_weights_before_they_run(gpu: Machine, tmp_path: Path) -> None:
    options = PlanOptions(batch=Range(1, 4, 8), length=Range(1, 8, 16), strip=True)
    bundle = plans.with_plans(make("steps", tmp_path / "bundle"), gpu, options)
    check_variants(bundle, gpu.backend(), TOLERANCE)


def test_a_second_text_asks_cuda_for_no_memory(bundles: Any, gpu: Machine) -> None:
    """And what is kept of a text never leaves the device: what goes out are logits."""
    found, sessions = generators(bundles("decoders"), gpu.backend())
    generator = next(iter(found.values()))
    ids, mask = decoders.prompts(4)
    generator.generate(ids, mask, options=WAYS["beams"])
    before = dict(gpu.cuda.calls)
    downloaded = gpu.cuda.downloaded
    generator.generate(ids, mask, options=WAYS["beams"])
    assert [gpu.cuda.calls[name] - before[name] for name in ("cudaMalloc", "cudaHostAlloc")] == [0, 0]
    # One row of logits for each prompt, and for each beam of each text one a step.
    rows = len(ids) + 9 * 3 * 4
    assert gpu.cuda.downloaded - downloaded <= rows * decoders.V * 4
    close_all(sessions)


# --- the whole runtime ---------------------------------------------------------------------------------------------


def test_a_runtime_answers_from_plans(bundles: Any, gpu: Machine) -> None:
    texts = ["w1 w2", "w3 w4 w5 w6", "w7"]
    answers = {}
    for backend in ("ort", "trt"):
        with Runtime(bundles("exits"), backend=backend) as runtime:
            answers[backend] = [runtime(texts, variant=name) for name in bundles("exits").manifest.variants]
    for found, expected in zip(answers["trt"], answers["ort"], strict=True):
        assert [one.output["label"] for one in found] == [one.output["label"] for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert one.output["scores"] == pytest.approx(other.output["scores"], abs=1e-5)


@pytest.mark.parametrize("kind", ["exits", "steps", "decoders"])
def test_texts_shorter_than_plans_are_padded(kind: str, tmp_path: Path, gpu: Machine) -> None:
    """Plans for 6 tokens and more, or for a fixed number of them, also warm up and read what is shorter."""
    lengths = Range(6, 8, 40) if kind == "decoders" else Range(10, 10, 10)
    bundle = plans.with_plans(make(kind, tmp_path / "bundle"), gpu, PlanOptions(batch=Range(1, 2, 4), length=lengths))
    outputs = []
    for backend in ("ort", "trt"):
        with Runtime(bundle, backend=backend) as runtime:
            name = next(iter(bundle.manifest.variants))
            answers = runtime(["w1", "w2 w3"], variant=name)
            outputs.append([one.output.get("text", one.output.get("label")) for one in answers])
    assert outputs[0] == outputs[1]


def test_a_prompt_may_be_read_in_pieces(bundles: Any, gpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the logits of all its tokens would take too much memory."""
    bundle = bundles("decoders")
    ids, mask = decoders.prompts(3)
    expected, _ = generators(bundle, ort)
    found, sessions = generators(bundle, gpu.backend())
    name = next(iter(found))
    wanted = expected[name].generate(ids, mask, options=WAYS["greedy"])
    monkeypatch.setattr(causal, "ROOM_BYTES", 4 * 3 * decoders.V * 4)  # four tokens at a time
    texts = found[name].generate(ids, mask, options=WAYS["greedy"])
    assert [one.tokens for one in texts] == [one.tokens for one in wanted]
    close_all(sessions)


def test_all_ratios_share_scratch_memory(bundles: Any, gpu: Machine) -> None:
    """As much as the largest needs, whichever are open."""
    bundle, backend = bundles("steps"), gpu.backend()
    names = list(bundle.manifest.variants)
    opened = [backend.open_sessions(bundle, [name], provider="cuda")[name] for name in names]
    for session in (*opened, *opened):
        session.run(exits.feeds(4))
    assert gpu.cuda.left["streams"] == 1
    places = [context.memory for engine in gpu.library.engines for context in engine.made]
    assert len(places) > 4 and len(set(places)) == 1
    for session in opened:
        session.close()


def test_lanes_stay_while_one_engine_is_opened_and_the_last_other_closed(
    bundles: Any, gpu: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, backend = bundles("steps"), gpu.backend()
    first, second = list(bundle.manifest.variants)[:2]
    before = backend.open_sessions(bundle, [first])[first]

    def made(*arguments: Any, **options: Any) -> PlanSession:
        before.close()  # as another thread may, after the lanes were chosen
        return PlanSession(*arguments, **options)

    monkeypatch.setattr(trt, "PlanSession", made)
    session = backend.open_sessions(bundle, [second])[second]
    session.run(exits.feeds(2))
    session.close()


def test_an_engine_that_cannot_be_opened_leaves_none_open(bundles: Any, gpu: Machine) -> None:
    """The second plan is none, whatever its record says."""
    bundle = bundles("exits")
    gpu.library.refused_after = 1
    with pytest.raises(
        BundleError, match=r"\.plan: trt 11\.4\.0\.106 cannot open it: got Serialization assertion failed$"
    ):
        gpu.backend().open_sessions(bundle)
    assert len(gpu.library.engines) == 1


def test_a_record_of_another_graph_is_refused(tmp_path: Path, gpu: Machine) -> None:
    """Whichever it names: one of the bundle, or none."""
    bundle = plans.with_plans(make("steps", tmp_path / "bundle"), gpu)
    graph, engine = next((e.graph, e) for e in bundle.manifest.engines.values() if e.backend == "trt")
    path = engine.path.removesuffix(".plan") + ".json"
    record = json.loads((bundle.path / path).read_text())
    (bundle.path / path).write_text(json.dumps({**record, "graph": "r9", "graph_key": "another"}))
    manifest = json.loads((bundle.path / "manifest.json").read_bytes())
    entry = {"size_bytes": (bundle.path / path).stat().st_size, "sha256": sha256_of(bundle.path / path)}
    manifest["files"][path] = entry
    raw = json.dumps(manifest).encode()
    (bundle.path / "manifest.json").write_bytes(raw)
    (bundle.path / "manifest.sha256").write_bytes(seal_of(raw))
    with pytest.raises(BundleError, match=f"the engine of {graph}: got a plan of another graph"):
        gpu.backend().checked_plan(Bundle.open(bundle.path), graph, plans.ADA)


def test_unknown_providers(bundles: Any, gpu: Machine) -> None:
    backend = gpu.backend()
    with pytest.raises(InputError, match="unknown provider: got 'dml', expected one of cpu, cuda, cuda-graphs"):
        backend.open_sessions(bundles("exits"), provider="dml")
    assert backend.device_name({"provider": "cuda"}) == "nvidia-geforce-rtx-4090-trt-no-graphs"
    sessions = backend.open_sessions(bundles("exits"), provider="cuda")
    for _ in range(3):
        next(iter(sessions.values())).run(exits.feeds(2))
    assert "cudaStreamBeginCapture" not in gpu.cuda.calls
    close_all(sessions)
