"""Every kind of variant, run by the TensorRT session over doubles of NVIDIA's library and of CUDA, on the processor.

What is shown is that our code asks both for the right things in the right order: results are those of ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from compexport.errors import BundleError, InputError
from engines import causal
from engines.backends import ort
from engines.backends.trt_options import PlanOptions, Range
from engines.beam import Beams
from engines.bundle import Bundle
from engines.cascade import Cascade
from engines.causal import CausalGenerator
from engines.exit_rule import ExitRule
from engines.options import Options
from engines.runtime import Runtime
from engines.sampling import Sampling
from tests.engines import decoders, exits, plans, steps
from tests.engines.plans import Machine

SAMPLED = Options(10, sampling=Sampling(temperature=0.9, top_k=40, top_p=0.95, seed=7))
WAYS = {
    "greedy": Options(10),
    "beams": Options(10, beams=Beams(num_beams=3, num_return_sequences=2)),
    "sampled": SAMPLED,
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    """A machine on which at the end nothing is left open."""
    there = plans.machine(monkeypatch)
    yield there
    assert not any(there.cuda.left.values()), there.cuda.left


def made(name: str, folder: Path) -> Bundle:
    with pytest.MonkeyPatch.context() as patch:
        return plans.with_plans(BUNDLES[name](folder), plans.machine(patch))


BUNDLES: dict[str, Any] = {
    "exits": exits.make_bundle,
    "steps": lambda folder: steps.make_bundle(folder, with_exits=False),
    "steps with exits": lambda folder: steps.make_bundle(folder, with_exits=True),
    "decoders": lambda folder: decoders.make_bundle(folder, ratios=(1, 2)),
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``bundles(name)``: one of BUNDLES with plans, made once."""
    there: dict[str, Bundle] = {}

    def bundle(name: str) -> Bundle:
        if name not in there:
            there[name] = made(name, tmp_path_factory.mktemp("plans") / name.replace(" ", "-"))
        return there[name]

    return bundle


def close_all(sessions: dict[str, Any]) -> None:
    for session in sessions.values():
        session.close()


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_allclose(found[name], expected[name], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["exits", "steps", "steps with exits"])
def test_variants_say_what_ort_says(bundles: Any, gpu: Machine, kind: str) -> None:
    bundle = bundles(kind)
    expected, found = ort.open_sessions(bundle, threads=1), gpu.backend().open_sessions(bundle)
    assert found.keys() == expected.keys() == bundle.manifest.variants.keys()
    for name in found:
        for batch in (1, 5, 3, 5):
            feeds = exits.feeds(batch, seed=batch)
            same(found[name].run(feeds), expected[name].run(feeds))
    close_all(found)


@pytest.mark.parametrize("kind", ["exits", "steps with exits"])
def test_rows_leave_where_they_leave_with_ort(bundles: Any, gpu: Machine, kind: str) -> None:
    """Which compacts the batch on the device: of what is held, nothing goes through the host."""
    bundle = bundles(kind)
    expected, found = ort.open_sessions(bundle, threads=1), gpu.backend().open_sessions(bundle)
    left = set()
    for name, cascade in found.items():
        other = expected[name]
        assert isinstance(cascade, Cascade) and isinstance(other, Cascade)
        for seed, threshold in enumerate((0.3, 0.6, 0.9)):
            feeds, rule = exits.feeds(7, seed), ExitRule(threshold)
            run, wanted = cascade.run_exits(feeds, rule), other.run_exits(feeds, rule)
            np.testing.assert_allclose(run.logits, wanted.logits, atol=2e-5)
            assert (run.exit_layer.tolist(), run.why) == (wanted.exit_layer.tolist(), wanted.why)
            left |= set(run.exit_layer.tolist())
        feeds = exits.feeds(4)
        same(cascade.every_exit().run(feeds), other.every_exit().run(feeds))
        for call in cascade.segment_calls(feeds):
            call()
    assert len(left) > 2
    close_all(found)


def generators(bundle: Bundle, backend: Any) -> tuple[dict[str, CausalGenerator], dict[str, Any]]:
    """By variant, and their sessions."""
    generation, sessions = bundle.manifest.generation, backend.open_sessions(bundle)
    assert generation is not None
    return {name: CausalGenerator(name, session, generation) for name, session in sessions.items()}, sessions


@pytest.mark.parametrize("way", WAYS)
def test_texts_are_those_of_ort(bundles: Any, gpu: Machine, way: str) -> None:
    """Padded prompts, rows that end at different times, beams that change places."""
    bundle = bundles("decoders")
    ids, mask = decoders.prompts(5)
    expected, _ = generators(bundle, ort)
    found, sessions = generators(bundle, gpu.backend())
    for name in found:
        texts = found[name].generate(ids, mask, options=WAYS[way])
        wanted = expected[name].generate(ids, mask, options=WAYS[way])
        for one, other in zip(texts, wanted, strict=True):
            assert [text.tokens for text in (one, *one.others)] == [text.tokens for text in (other, *other.others)]
        assert len({tuple(one.tokens) for one in texts}) > 1
    close_all(sessions)


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
    # One row of logits for each token of the prompts, and for each beam of each text one a step.
    rows = ids.size + 9 * 3 * 4
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
    bundle = plans.with_plans(
        BUNDLES[kind](tmp_path / "bundle"), gpu, PlanOptions(batch=Range(1, 2, 4), length=lengths)
    )
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


def test_an_engine_that_cannot_be_opened_leaves_none_open(bundles: Any, gpu: Machine) -> None:
    """The second plan is none, whatever its record says."""
    bundle = bundles("exits")
    gpu.library.refused_after = 1
    with pytest.raises(
        BundleError, match=r"\.plan: trt 11\.4\.0\.106 cannot open it: got Serialization assertion failed$"
    ):
        gpu.backend().open_sessions(bundle)
    assert len(gpu.library.engines) == 1


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
