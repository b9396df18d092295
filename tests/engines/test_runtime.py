"""The runtime over a fake backend: choosing, splitting and restoring order, opening once, errors, threads, imports."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from calib.data import Examples
from calib.quality import evaluate
from compexport.errors import BundleError, CompexportError, InputError
from engines.bundle import Bundle
from engines.manifest import Manifest, TensorSpec
from engines.results import BatchResult, Result
from engines.runtime import Runtime
from engines.selector import Correction
from engines.session import OpenSession
from engines.text import Text
from tests.engines.test_text import ALL_INPUTS, save_tokenizer

RATIOS = (1, 2, 4, 8)
NAMES = tuple(f"variator-r{ratio}-fp32" for ratio in RATIOS)
R1, R2, R4, R8 = NAMES
MEMBERS = list(zip(NAMES, RATIOS, strict=True))
OUTPUTS = {
    "feature-extraction": ["last_hidden_state", "sentence_embedding"],
    "sequence-classification": ["logits"],
    "token-classification": ["logits"],
    "question-answering": ["start_logits", "end_logits"],
    "label-words": ["logits"],
}
LABELS = {
    "sequence-classification": ["bad", "good"],
    "token-classification": ["O", "PER"],
    "label-words": ["no", "yes"],
}
WORDS = {"words": ["no", "yes"], "word_ids": [5, 6], "decoder_input_ids": [0], "template": "the {text} quick brown fox"}


def make_manifest(task: str, **changes: Any) -> Manifest:
    parity = {"max_abs": 0.0, "tolerance": 1e-4, "shapes": []}
    graph = {"opset": 18, "inputs": [], "outputs": [], "cost": {}, "parity": parity, "key": "k"}
    engine = {"backend": "fake", "backend_version": "1", "device": "cpu", "files": [], "key": "k"}
    variant = {"method": "variator", "precision": "fp32", "params": 1, "extra_params": 0, "flops_ratio": 1.0}
    record = {
        "backbone": {
            "name": "tiny",
            "architecture": "BertModel",
            "model_type": "bert",
            "sha256": "0" * 64,
            "params": 1,
            "hidden_size": 2,
            "layers": 1,
        },
        "method": "variator",
        "task": task,
        "labels": LABELS.get(task, []),
        **({"label_words": WORDS} if task == "label-words" else {}),
        "tokenizer": {"path": "tokenizer.json", "max_length": 16, "pad_id": 0, "inputs": ALL_INPUTS},
        "variants": {name: {**variant, "ratio": r, "graphs": {"encoder": f"r{r}"}} for name, r in MEMBERS},
        "graphs": {f"r{r}": {**graph, "path": f"graphs/r{r}.onnx"} for r in RATIOS},
        "engines": {f"e{r}": {**engine, "graph": f"r{r}", "path": f"engines/fake-cpu/r{r}"} for r in RATIOS},
        "files": {},
        "versions": {},
        "command": "test",
        **changes,
    }
    return Manifest.model_validate(record)


class FakeBundle:
    """What a runtime reads of a ``Bundle``."""

    def __init__(self, path: Path, manifest: Manifest, tables: dict[str, Any], quality: Any) -> None:
        self.path = path
        self.manifest = manifest
        self._tables = tables
        self._quality = quality

    def file(self, rel: str, *, check: bool = True) -> Path:
        return self.path / rel

    def profile(self, device: str) -> Any:
        return self._tables.get(device)

    def profiles(self) -> list[str]:
        return sorted(self._tables)

    def quality(self) -> Any:
        return self._quality


class FakeSession:
    """Answers from the ids alone, so that order, padding and truncation show in the outputs."""

    def __init__(self, variant: str, task: str, delay_s: float = 0.0) -> None:
        self.variant = variant
        self.task = task
        self.delay_s = delay_s
        self.outputs = [TensorSpec(name=name, dtype="float32", shape=["batch"]) for name in OUTPUTS[task]]
        self.shapes: list[tuple[int, ...]] = []
        self.closed = False

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None) -> dict[str, Any]:
        ids, mask = feeds["input_ids"], feeds["attention_mask"]
        self.shapes.append(ids.shape)
        time.sleep(self.delay_s)
        total = (ids * mask).sum(axis=1).astype(np.float32)
        per_token = np.stack([-ids, ids], axis=-1).astype(np.float32)
        values = {
            "last_hidden_state": per_token,
            "sentence_embedding": np.stack([total, mask.sum(axis=1)], axis=-1).astype(np.float32),
            "logits": np.stack([20 - total, total - 20], axis=-1)
            if self.task in {"sequence-classification", "label-words"}
            else per_token,
            "start_logits": ids.astype(np.float32),
            "end_logits": ids.astype(np.float32),
        }
        return {name: values[name] for name in outputs or OUTPUTS[self.task]}

    def close(self) -> None:
        self.closed = True


class FakeBackend:
    """Opens fake sessions, slowly, and remembers how often."""

    NAME = "fake"

    def __init__(self, delay_s: float = 0.0, opening_s: float = 0.01) -> None:
        self.delay_s = delay_s
        self.opening_s = opening_s
        self.opened: list[str] = []
        self.sessions: dict[str, FakeSession] = {}
        self.options: Mapping[str, Any] = {}

    def device_name(self, options: Mapping[str, Any]) -> str:
        self.options = options
        return "cpu-fake"

    def shortest_text(self, bundle: Bundle) -> int:
        return 1

    def open_sessions(
        self, bundle: Bundle, variants: Sequence[str] | None, *, threads: int | None, provider: str
    ) -> Mapping[str, OpenSession]:
        time.sleep(self.opening_s)
        self.opened += variants or []
        made = {name: FakeSession(name, bundle.manifest.task, self.delay_s) for name in variants or []}
        self.sessions |= made
        return cast(Mapping[str, OpenSession], made)


def make_profile(backend: str = "fake", scale: float = 1.0) -> dict[str, Any]:
    """Batches 1 and 4, lengths 4 and 16; at batch 1 p99 is 800, 400, 200, 100 ms: far above what a test takes."""
    rows = [
        {"variant": n, "batch": b, "length": s, "p50_ms": scale * b * 400 / r, "p99_ms": scale * b * 800 / r, "runs": 9}
        for n, r in MEMBERS
        for b in (1, 4)
        for s in (4, 16)
    ]
    return {"device": "cpu-fake", "backend": backend, "threads": 1, "rows": rows}


QUALITY = {"metric": "acc", "higher_is_better": True, "variants": dict(zip(NAMES, (0.9, 0.8, 0.7, 0.6), strict=True))}
MakeRuntime = Callable[..., Runtime]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bundle")
    save_tokenizer(path)
    return path


@pytest.fixture
def make_runtime(folder: Path) -> MakeRuntime:
    def make(
        task: str = "feature-extraction",
        *,
        backend: FakeBackend | None = None,
        tables: dict[str, Any] | None = None,
        quality: Any = QUALITY,
        manifest: dict[str, Any] | None = None,
        **options: Any,
    ) -> Runtime:
        tables = {"cpu-fake": make_profile()} if tables is None else tables
        bundle = FakeBundle(folder, make_manifest(task, **(manifest or {})), tables, quality)
        return Runtime(cast(Bundle, bundle), backend=backend or FakeBackend(), **options)

    return make


def backend_of(runtime: Runtime) -> FakeBackend:
    return cast(FakeBackend, runtime._opening.backend)


def run_in_threads(work: Callable[[int], None], count: int) -> None:
    """Run ``work(number)`` in threads and raise the first failure here."""
    failures: list[BaseException] = []

    def guarded(number: int) -> None:
        try:
            work(number)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_one_text_one_result(make_runtime: MakeRuntime) -> None:
    result = make_runtime("sequence-classification")("a quick fox", budget_ms=250)
    assert isinstance(result, Result)
    assert (result.label, result.variant, result.met_budget) == ("good", R4, True)
    assert result.predicted_ms == pytest.approx(200.0)
    assert result.scores is not None and sum(result.scores.values()) == pytest.approx(1.0)
    assert 0 < result.latency_ms < 250
    assert result.output["label"] == "good"


@pytest.mark.parametrize(
    ("task", "text", "keys"),
    [
        ("sequence-classification", "a film", {"label", "scores"}),
        ("token-classification", "a film", {"labels"}),
        ("question-answering", ("who ?", "bob made it"), {"start", "end", "answer"}),
        ("feature-extraction", "a film", {"embedding"}),
        ("label-words", "a film", {"label", "scores"}),
    ],
)
def test_every_task_has_its_keys(make_runtime: MakeRuntime, task: str, text: Any, keys: set[str]) -> None:
    result = make_runtime(task)(text)
    assert keys <= set(result.output)
    assert (result.label is None) == (result.scores is None) == (task not in {"sequence-classification", "label-words"})


def test_label_words_are_asked_through_their_template(make_runtime: MakeRuntime) -> None:
    """The fake says yes from ids that add up to 20: the text's own do not, with the template's words they do."""
    assert make_runtime("sequence-classification")("a film").label == "bad"
    assert make_runtime("label-words")("a film").label == "yes"


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("label-words", {"label_words": None}, "belong to the task label-words"),
        ("feature-extraction", {"label_words": WORDS}, "belong to the task label-words"),
        ("label-words", {"labels": ["no"]}, "one word and one id for each of 1 labels"),
        ("label-words", {"label_words": {**WORDS, "word_ids": [5]}}, "one word and one id for each of 2 labels"),
        ("label-words", {"label_words": {**WORDS, "template": "the"}}, r"needs one \{text\}"),
    ],
)
def test_a_manifest_whose_words_do_not_fit_is_refused(task: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_manifest(task, **changes)


def test_label_words_are_written_for_their_task_only() -> None:
    assert make_manifest("label-words").model_dump()["label_words"] == WORDS
    assert "label_words" not in make_manifest("feature-extraction").model_dump()


def test_an_answer_from_the_context(make_runtime: MakeRuntime) -> None:
    result = make_runtime("question-answering")(("who made it ?", "The film Bob made"))
    assert result.output["answer"] == "The"  # the fake's logits are the ids, and "the" has the largest


def test_a_list_keeps_its_order_in_runs_of_similar_length(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    texts = ["a " * n for n in (9, 1, 5, 3, 7, 2, 8, 4, 6, 10)]
    results = runtime(texts, variant=R4)
    assert isinstance(results, list)
    assert [result.output["embedding"][1] for result in results] == [text.count("a") + 2 for text in texts]
    assert backend_of(runtime).sessions[R4].shapes[1:] == [(4, 6), (4, 10), (2, 12)]


def test_a_batch_is_predicted_as_it_runs(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    batch = runtime.run_batch(["a " * 5] * 10, variant=R8)
    assert batch.predicted_ms == pytest.approx(400 + 400 + 200)
    assert not batch.decision.extrapolated


def test_without_a_profile_batches_are_split_at_32(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(tables={})
    assert len(runtime(["a"] * 70)) == 70
    assert [shape[0] for shape in backend_of(runtime).sessions[R1].shapes[1:]] == [32, 32, 6]


def test_pairs_in_a_list(make_runtime: MakeRuntime) -> None:
    texts: list[Text] = [("a", "film"), ["a", "film"], "a"]
    results = make_runtime()(texts)
    assert [result.output["embedding"][1] for result in results] == [5, 5, 3]


@pytest.mark.parametrize(("budget_ms", "variant"), [(50, R8), (110, R8), (250, R4), (500, R2), (900, R1), (None, R1)])
def test_budgets_walk_up_the_family(make_runtime: MakeRuntime, budget_ms: float | None, variant: str) -> None:
    runtime = make_runtime()
    assert runtime("a film", budget_ms=budget_ms).variant == variant
    assert runtime.select(batch=1, length=8, budget_ms=budget_ms).variant == variant


def test_time_waited_counts(make_runtime: MakeRuntime) -> None:
    result = make_runtime()("a film", budget_ms=900, waited_ms=600)
    assert (result.variant, result.met_budget) == (R4, True)
    assert 600 < result.latency_ms < 900
    assert not make_runtime()("a film", budget_ms=500, waited_ms=600).met_budget


def test_opening_does_not_count_and_happens_once(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(backend=FakeBackend(opening_s=0.3))
    assert backend_of(runtime).opened == []
    assert runtime("a", budget_ms=900).latency_ms < 300
    runtime("a", budget_ms=900)
    assert backend_of(runtime).opened == list(NAMES)


def test_a_forced_member_opens_alone(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    assert runtime("a", ratio=4, budget_ms=1000).variant == R4
    assert runtime("a", variant=R4).variant == R4
    assert backend_of(runtime).opened == [R4]
    assert runtime.session(R4) is runtime.session(R4)


def test_met_budget_is_what_happened(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(backend=FakeBackend(delay_s=0.05), tables={"cpu-fake": make_profile(scale=0.01)})
    batch = runtime.run_batch(["a film"], budget_ms=30)
    assert batch.decision.met_budget
    assert not batch.met_budget
    assert batch.latency_ms >= 50


def test_the_document_has_its_keys(make_runtime: MakeRuntime) -> None:
    document = make_runtime().run_batch(["a", "film"]).document()
    assert {"variant", "predicted_ms", "latency_ms", "met_budget", "outputs"} <= set(document)
    assert len(document["outputs"]) == 2


def test_the_correction_follows_the_engine(make_runtime: MakeRuntime) -> None:
    tables = {"cpu-fake": make_profile(scale=0.01)}  # the best variant is said to take 4 ms
    runtime = make_runtime(backend=FakeBackend(delay_s=0.016), tables=tables, correction=Correction())
    for _ in range(15):
        runtime("a film", variant=R1)
    assert 2.5 < runtime.correction.factor(R1) <= 8.0
    assert runtime.correction.factor(R8) > 1.5
    assert runtime.select(length=8, budget_ms=5.0).variant != R2  # which the profile alone would allow


def test_a_prediction_outside_the_grid_only_tells_of_slowness(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime()
    for _ in range(5):
        runtime("a", variant=R1)  # 3 tokens; the shortest measured are 4
    assert runtime.correction.factor(R1) == 1.0


def test_no_profile_for_this_device(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(tables={"gpu": make_profile(), "cpu-other": make_profile()})
    assert runtime("a").variant == R1
    assert runtime("a", budget_ms=math.inf).variant == R1
    assert runtime("a", ratio=8, budget_ms=500).variant == R8
    match = (
        r"a budget needs a latency profile of device cpu-fake: got profiles of: cpu-other, gpu; run `compexport bench"
    )
    for request in (lambda: runtime("a", budget_ms=5), lambda: runtime.select(budget_ms=5)):
        with pytest.raises(InputError, match=match):
            request()


def test_a_profile_of_another_backend_is_none(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(tables={"cpu-fake": make_profile(backend="ov")})
    assert runtime.profile is None


def test_a_single_variant_needs_no_profile(make_runtime: MakeRuntime) -> None:
    result = make_runtime(tables={}, variants=[R8])("a", budget_ms=500)
    assert (result.variant, result.predicted_ms, result.met_budget) == (R8, None, True)


def test_unmeasured_quality(make_runtime: MakeRuntime) -> None:
    decision = make_runtime(quality=None).select(budget_ms=500)
    assert decision.variant == R2
    assert "quality not measured" in decision.reason


def test_select_defaults_to_the_longest_measured(make_runtime: MakeRuntime) -> None:
    assert not make_runtime().select(budget_ms=500).extrapolated
    assert make_runtime().select(length=17, budget_ms=500).extrapolated
    with pytest.raises(InputError, match="batch is out of range"):
        make_runtime(tables={}).select(batch=0)


@pytest.mark.parametrize("budget_ms", [0, -5, math.nan])
def test_senseless_budgets(make_runtime: MakeRuntime, budget_ms: float) -> None:
    runtime = make_runtime()
    with pytest.raises(InputError, match="budget_ms is out of range"):
        runtime("a", budget_ms=budget_ms)
    with pytest.raises(InputError, match="budget_ms is out of range"):
        runtime.select(budget_ms=budget_ms, variant=R1)
    assert backend_of(runtime).opened == []


@pytest.mark.parametrize(
    ("request_", "match"),
    [
        ({"variant": "nope"}, f"unknown variant: got nope, expected one of {', '.join(NAMES)}"),
        ({"ratio": 3}, "no variant has this ratio: got 3, expected one of 1, 2, 4, 8"),
        ({"ratio": math.nan}, "no variant has this ratio: got nan"),
        ({"ratio": 2, "variant": R2}, "both ratio and variant were given"),
    ],
)
def test_unknown_members_list_the_choices(make_runtime: MakeRuntime, request_: dict[str, Any], match: str) -> None:
    runtime = make_runtime()
    with pytest.raises(InputError, match=match):
        runtime("a", **request_)
    with pytest.raises(InputError, match=match):
        runtime.select(**request_)


def test_a_ratio_in_two_precisions_must_be_named(make_runtime: MakeRuntime) -> None:
    variants = make_manifest("feature-extraction").model_dump()["variants"]
    variants["variator-r4-int8"] = {**variants[R4], "precision": "int8"}
    runtime = make_runtime(manifest={"variants": variants})
    with pytest.raises(InputError, match=f"several variants have ratio 4: expected one named: {R4}, variator-r4-int8"):
        runtime("a", ratio=4)


def test_only_some_variants(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(variants=[R2, R8])
    assert runtime("a").variant == R2
    assert backend_of(runtime).opened == [R2]  # without a budget no other can be chosen
    runtime("a", budget_ms=500)
    assert backend_of(runtime).opened == [R2, R8]
    for wrong in (["nope"], []):
        with pytest.raises(InputError, match="unknown variant: got"):
            make_runtime(variants=wrong)


def test_a_missing_engine(make_runtime: MakeRuntime) -> None:
    engines = make_manifest("feature-extraction").model_dump()["engines"]
    del engines["e4"]
    match = f"variant {R4} has no engine for backend fake; run `compexport build --backend fake` again"
    with pytest.raises(BundleError, match=match):
        make_runtime(manifest={"engines": engines})
    assert make_runtime(manifest={"engines": engines}, variants=[R1])("a").variant == R1


@pytest.mark.parametrize(
    ("backend", "precision", "ways"),
    [
        ("fake", "fp16", "choose --backend trt-rtx, or run `compexport build --backend fake --precision fp16` again"),
        ("ort", "bf16", "choose --backend trt-rtx"),  # which it computes nothing in
    ],
)
def test_a_missing_engine_of_another_backend_and_precision(
    make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch, backend: str, precision: str, ways: str
) -> None:
    """Without its precision the command would replace what is there."""
    there = make_manifest("feature-extraction").model_dump()
    engines = {name: {**engine, "backend": "trt-rtx"} for name, engine in there["engines"].items()}
    variants = {name: {**variant, "precision": precision} for name, variant in there["variants"].items()}
    monkeypatch.setattr(FakeBackend, "NAME", backend)
    with pytest.raises(BundleError) as raised:
        make_runtime(manifest={"engines": engines, "variants": variants})
    assert str(raised.value) == f"variant {R1} has no engine for backend {backend}: got engines for trt-rtx; {ways}"


def test_a_bundle_without_a_tokenizer(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(manifest={"tokenizer": None})
    assert runtime.select(budget_ms=500).variant == R2
    runtime.session(R1)
    with pytest.raises(InputError, match="has no tokenizer, so it cannot read text"):
        runtime("a")


def test_texts_too_long(make_runtime: MakeRuntime, caplog: pytest.LogCaptureFixture) -> None:
    runtime = make_runtime()
    with caplog.at_level(logging.WARNING):
        results = runtime(["a", "a " * 50])
    assert [result.truncated for result in results] == [False, True]
    assert "longer than the model's 16 tokens" in caplog.text
    with pytest.raises(InputError, match="longer than the model's 16 tokens"):
        runtime("a " * 50, truncate=False)


@pytest.mark.parametrize("text", ["", "   ", [], ["a", " "]])
def test_empty_texts(make_runtime: MakeRuntime, text: Any) -> None:
    with pytest.raises(InputError, match=r"is empty|no text was given"):
        make_runtime()(text)


def test_closing(make_runtime: MakeRuntime) -> None:
    with make_runtime() as runtime:
        runtime("a")
    assert all(session.closed for session in backend_of(runtime).sessions.values())
    with pytest.raises(CompexportError, match="the runtime is closed"):
        runtime("a")


def test_what_cannot_run_is_closed_again(make_runtime: MakeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = make_runtime()
    with monkeypatch.context() as patch:
        patch.setattr(FakeSession, "run", lambda *_: (_ for _ in ()).throw(CompexportError("out of memory")))
        with pytest.raises(CompexportError, match="out of memory"):
            runtime.warm_up()
    broken = list(backend_of(runtime).sessions.values())
    assert broken and all(session.closed for session in broken)
    runtime("a")
    assert not any(session.closed for session in backend_of(runtime).sessions.values() if session not in broken)


def test_damaged_tables_are_named_but_do_not_stop_measuring_again(make_runtime: MakeRuntime) -> None:
    table = make_profile()
    table["rows"][3]["p50_ms"] = math.nan
    runtime = make_runtime(tables={"cpu-fake": table})
    runtime.session(R1)
    with pytest.raises(BundleError, match=rf"latency profile row 3 \({R1}, batch 4, length 16\) has p50_ms nan"):
        runtime("a")
    values = {**dict(MEMBERS), R2: math.nan}
    runtime = make_runtime(quality={"metric": "acc", "variants": values})
    with pytest.raises(BundleError, match=f"quality table, variant {R2}: got nan"):
        runtime.select(budget_ms=5)
    examples = Examples(["a film", "the quick fox", "a"], origin="rows.tsv")
    runtime = make_runtime(tables={"cpu-fake": table}, quality={"metric": "acc", "variants": values})
    assert set(evaluate(runtime, examples).table["variants"]) == set(NAMES)


def test_options_reach_the_backend(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(threads=2, provider="cuda")
    assert backend_of(runtime).options == {"threads": 2, "provider": "cuda"}
    assert runtime.device == "cpu-fake"


def test_many_threads_call_one_runtime(make_runtime: MakeRuntime) -> None:
    runtime = make_runtime(backend=FakeBackend(delay_s=0.001))
    texts = [["a " * ((number * 7 + i) % 13 + 1) for i in range(number % 9 + 1)] for number in range(12)]
    expected = [[text.count("a") + 2 for text in batch] for batch in texts]

    def work(number: int) -> None:
        for round_ in range(6):
            batch = runtime.run_batch(texts[number], budget_ms=(None, 150.0, 2500.0)[round_ % 3])
            assert isinstance(batch, BatchResult)
            assert [output["embedding"][1] for output in batch.outputs] == expected[number]

    run_in_threads(work, len(texts))
    assert sorted(backend_of(runtime).opened) == sorted(NAMES)


def test_an_engine_that_cannot_open_is_tried_again(make_runtime: MakeRuntime) -> None:
    class Failing(FakeBackend):
        def open_sessions(self, *args: Any, **options: Any) -> Mapping[str, OpenSession]:
            if not self.opened:
                self.opened.append("failed")
                raise BundleError("engine was built by another version; run `compexport build` again")
            return super().open_sessions(*args, **options)

    runtime = make_runtime(backend=Failing())
    with pytest.raises(BundleError, match="another version"):
        runtime("a")
    assert runtime("a").variant == R1


def test_importing_the_runtime_is_light() -> None:
    heavy = "torch transformers onnx onnxruntime tokenizers"
    code = f"import sys, engines.runtime; print([m for m in '{heavy}'.split() if m in sys.modules])"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
