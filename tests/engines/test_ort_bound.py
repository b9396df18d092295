"""Bound sessions, as they run on a GPU, over this process's memory: the same answers, and who owns which memory."""

from __future__ import annotations

import gc
import logging
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper

from compexport.errors import CompexportError
from engines.backends import ort
from engines.backends.bfloat16 import bits_of
from engines.backends.ort_bound import BoundSession
from engines.backends.ort_captured import Captures
from engines.backends.ort_rows import gather_model, rows_taken
from engines.backends.ort_values import array_of, element_type, empty_value, stored, value_of
from engines.beam import Beams
from engines.bundle import Bundle
from engines.cascade import Cascade
from engines.causal import CausalGenerator
from engines.exit_rule import ExitRule
from engines.manifest import TensorSpec
from engines.options import Options
from tests.engines import decoders, exits, steps

BOUND = ["cuda", "cuda-graphs"]


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[BoundSession]]:
    """``ort.open_sessions`` and ``open_graphs`` of a provider on CUDA, with this process's memory for the device's.

    Gives the sessions that they open.
    """
    opened: list[BoundSession] = []

    def open_graph(bundle: Bundle, graph: str, name: str, threads: int | None, provider: str) -> ort.OrtSession:
        if provider == "cpu":
            return as_ever(bundle, graph, name, threads, provider)
        facts = bundle.manifest.graphs[graph]
        path = bundle.file(facts.path)
        opened.append(ort.open_bound(name, facts, path, threads=threads, provider=provider, memory="cpu"))
        return opened[-1]

    as_ever = ort._open_graph
    monkeypatch.setattr(ort, "_open_graph", open_graph)
    monkeypatch.setattr(ort, "require_provider", lambda provider: None)
    yield opened


# --- whole engines -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_exits(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return exits.make_bundle(tmp_path_factory.mktemp("exits") / "bundle")


@pytest.mark.parametrize("provider", BOUND)
def test_cascades_answer_as_ever(with_exits: Bundle, on_device: list[BoundSession], provider: str) -> None:
    """Every row leaves where it did, in whatever shapes; shapes that come again run in buffers of their own."""
    name = exits.NAMES[1.0]
    usual, bound = (ort.open_sessions(with_exits, [name], threads=1, provider=p)[name] for p in ("cpu", provider))
    assert isinstance(usual, Cascade) and isinstance(bound, Cascade)
    for rows, seed in ((7, 0), (3, 1), (7, 0), (7, 2), (3, 1), (7, 0)):
        given = exits.feeds(rows, seed=seed)
        for found, expected in zip(bound.run(given).values(), usual.run(given).values(), strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-5)
        rule = ExitRule(0.8)
        found, expected = bound.run_exits(given, rule), usual.run_exits(given, rule)
        assert found.exit_layer.tolist() == expected.exit_layer.tolist() and found.why == expected.why
        np.testing.assert_allclose(found.logits, expected.logits, atol=1e-5)
    graphs = [session.captured for session in on_device]
    assert (min(graphs) > 0) if provider == "cuda-graphs" else (max(graphs) == 0)


@pytest.mark.parametrize("provider", BOUND)
def test_step_engines_answer_as_ever(tmp_path: Path, on_device: list[BoundSession], provider: str) -> None:
    """One session runs step after step over what the step before gave: a buffer that was still read would be wrong."""
    bundle = steps.make_bundle(tmp_path / "bundle", with_exits=False)
    usual = ort.open_sessions(bundle, threads=1)
    bound = ort.open_sessions(bundle, threads=1, provider=provider)
    for _ in range(3):
        for ratio, name in steps.NAMES.items():
            given = exits.feeds(5, seed=ratio)
            np.testing.assert_allclose(bound[name].run(given)["logits"], usual[name].run(given)["logits"], atol=1e-5)
    assert any(session.captured for session in on_device) == (provider == "cuda-graphs")


@pytest.mark.parametrize("provider", BOUND)
def test_decoders_write_as_ever(tmp_path: Path, on_device: list[BoundSession], provider: str) -> None:
    bundle = decoders.make_bundle(tmp_path / "bundle")
    graph = bundle.manifest.variants[decoders.NAMES[1]].graphs["decoder"]
    generation = bundle.manifest.generation
    assert generation is not None
    usual, bound = (
        CausalGenerator("tiny", ort.open_graphs(bundle, [graph], threads=1, provider=p)[graph], generation)
        for p in ("cpu", provider)
    )
    ids, mask = decoders.prompts(5)
    for beams in (Beams(), Beams(3)):
        options = Options(10, beams=beams)
        for _ in range(2):
            assert _tokens(bound.generate(ids, mask, options=options)) == _tokens(
                usual.generate(ids, mask, options=options)
            )
    assert [session.captured for session in on_device] == [0], "a past that grows never comes again"


def _tokens(texts: list[Any]) -> list[Any]:
    return [(one.tokens, one.why, [other.tokens for other in one.others]) for one in texts]


# --- buffers of captured runs --------------------------------------------------------------------------------------


def doubling() -> Any:
    """A session of ``y = x + x`` and ``z = -x`` [a, b], with the entry that it would have in a manifest."""
    number = element_type("float32")
    x, y, z = (helper.make_tensor_value_info(name, number, ["a", "b"]) for name in "xyz")
    nodes = [helper.make_node("Add", ["x", "x"], ["y"]), helper.make_node("Neg", ["x"], ["z"])]
    graph = helper.make_graph(nodes, "double", [x], [y, z])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    inner = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    entry = [TensorSpec(name=name, dtype="float32", shape=["a", "b"]) for name in "xyz"]
    return inner, SimpleNamespace(inputs=entry[:1], outputs=entry[1:])


class Spy:
    """A session that says what is asked of it, and fails in runs of graphs if ``broken``."""

    def __init__(self, inner: Any, broken: bool = False) -> None:
        self._inner = inner
        self.broken = broken
        self.ids: list[str] = []
        self.released: list[int] = []
        self.inside = 0
        self.overlapped = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def release_captured_graph(self, number: int) -> None:
        self.released.append(number)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        number = options.get_run_config_entry("gpu_graph_id") if options is not None else ""
        self.ids.append(number)
        if self.broken and number != "-1":
            raise RuntimeError("CUDA failure 900: operation not permitted when stream is capturing\nand more")
        self.inside += 1
        self.overlapped |= self.inside > 1
        self._inner.run_with_iobinding(binding, options)
        self.inside -= 1


def captured_session(most: int = 16, broken: bool = False) -> tuple[BoundSession, Spy, list[Spy]]:
    """With the session inside, and those that replaced it after a failure."""
    inner, facts = doubling()
    spy, plain = Spy(inner, broken), []

    def again() -> Spy:
        plain.append(Spy(inner))
        return plain[-1]

    return BoundSession("double", facts, spy, "cpu", Captures("double", spy, "cpu", again, most)), spy, plain


def numbers(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 3)).astype(np.float32)


def test_shapes_are_captured_when_they_come_again() -> None:
    session, spy, _ = captured_session()
    for seed in range(4):
        for rows in (2, 5):
            x = numbers(rows, seed)
            assert np.array_equal(session.run({"x": x})["y"], x + x)
    assert spy.ids == ["-1", "-1", "1", "2", "1", "2", "1", "2"] and session.captured == 2
    session.run({"x": numbers(2)}, ["y"])
    assert spy.ids[-1] == "-1", "other outputs are another graph"


def test_the_least_recently_used_graph_makes_room_and_its_id_is_never_used_again() -> None:
    session, spy, _ = captured_session(most=2)
    for rows in (1, 2, 1, 2, 1, 3, 3):  # the third shape replaces 2, which was not used last
        session.run({"x": numbers(rows)})
    assert spy.released == [2] and spy.ids[-1] == "3" and session.captured == 2
    for rows in (2, 2):
        assert np.array_equal(session.run({"x": numbers(rows)})["z"], -numbers(rows))
    assert spy.ids[-2:] == ["-1", "4"] and spy.released == [2, 1]
    session.close()
    assert spy.released == [2, 1, 3, 4]
    with pytest.raises(CompexportError, match="double: the engine is closed; load the bundle again"):
        session.run({"x": numbers(1)})


def test_what_was_given_is_not_written_again() -> None:
    """Neither arrays nor what is held, whether the run before was captured or not."""
    session, _, _ = captured_session()
    given = []
    for seed in range(4):
        x = numbers(4, seed)
        found, held = session.run_held({"x": x}, {}, ("y",), ("z",))
        given.append((x, found["y"], held["z"]))
    assert session.captured == 1
    for x, y, z in given:
        assert np.array_equal(y, x + x) and np.array_equal(array_of(z), -x)
    # ... and what is held goes in again, from wherever it lies.
    for x, _, z in given:
        found, _ = session.run_held({}, {"x": z}, ("y",), ("z",))
        assert np.array_equal(found["y"], -x - x)


def test_a_capture_that_fails_is_said_once_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    session, spy, plain = captured_session(broken=True)
    with caplog.at_level(logging.WARNING):
        for seed in range(5):
            x = numbers(2, seed)
            assert np.array_equal(session.run({"x": x})["y"], x + x)
    (record,) = caplog.records
    assert record.getMessage() == (
        "double: runs without CUDA graphs; got CUDA failure 900: operation not permitted when stream is capturing"
    )
    assert spy.ids == ["-1", "1"] and plain[0].ids == ["-1"] * 4 and session.captured == 0
    gone = weakref.ref(spy)
    del spy
    gc.collect()
    assert gone() is None, "it has weights on the device"


@pytest.mark.parametrize("captures", [True, False])
def test_a_run_that_fails_is_one_line(captures: bool) -> None:
    inner, facts = doubling()
    kept = Captures("double", inner, "cpu", lambda: inner) if captures else None
    session = BoundSession("double", facts, inner, "cpu", kept)
    with pytest.raises(CompexportError, match="^double: ONNX Runtime failed: got [^\n]*Invalid rank[^\n]*$"):
        session.run_held({"x": np.ones(3, np.float32)}, {}, ("y",), ())


def test_threads_take_turns() -> None:
    session, spy, _ = captured_session()
    wrong: list[int] = []

    def work(seed: int) -> None:
        for turn in range(30):
            x = numbers(1 + turn % 3, seed)
            found, held = session.run_held({"x": x}, {}, ("y",), ("z",))
            if not (np.array_equal(found["y"], x + x) and np.array_equal(array_of(held["z"]), -x)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not spy.overlapped and session.captured == 3


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (4, 3), (4, 2, 5, 3)])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64"])
def test_rows_are_taken_of_every_type_and_rank(dtype: str, shape: tuple[int, ...]) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)  # which every one of these types holds
    number = element_type(dtype)
    held = value_of(stored(array if dtype == "bfloat16" else array.astype(dtype), number), number)
    for rows in ([2], [3, 0, 0, 1], [0, 1, 2, 3]):
        taken = rows_taken(held, np.array(rows), "cpu")
        assert taken.element_type() == number and np.array_equal(array_of(taken), array[rows])


def test_all_rows_as_they_are_need_no_copy() -> None:
    inner, facts = doubling()
    session = BoundSession("double", facts, inner, "cpu")
    held = value_of(numbers(3), element_type("float32"))
    assert session.take_rows(held, np.arange(3)) is held
    assert np.array_equal(array_of(session.take_rows(held, np.array([2, 1, 0]))), numbers(3)[::-1])


def test_a_past_of_no_tokens() -> None:
    held = empty_value((2, 4, 0, 8), element_type("bfloat16"), "cpu")
    assert rows_taken(held, np.array([1, 1, 0]), "cpu").shape() == [3, 4, 0, 8]
    assert array_of(held).shape == (2, 4, 0, 8)


def test_bfloat16_rounds_as_pytorch() -> None:
    import torch

    values = np.array([1.0, 1.00390625, 1.01171875, -3.1e38, 1e-40, np.inf, -np.inf, np.nan, 0.1, -0.0], np.float32)
    values = np.concatenate([values, np.random.default_rng(0).standard_normal(1000).astype(np.float32)])
    expected = torch.from_numpy(values).to(torch.bfloat16)
    assert np.array_equal(bits_of(values)[~np.isnan(values)], expected.view(torch.uint16).numpy()[~np.isnan(values)])
    value = value_of(stored(values, element_type("bfloat16")), element_type("bfloat16"))
    assert np.array_equal(array_of(value), expected.float().numpy(), equal_nan=True)
    ml_dtypes = pytest.importorskip("ml_dtypes")
    assert np.array_equal(bits_of(values.astype(ml_dtypes.bfloat16)), bits_of(values))


@pytest.mark.parametrize("most", [0, 4])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_halves_go_in_and_come_out(dtype: str, most: int) -> None:
    """Of the halves, the processor copies both; it adds up none, so the graph does not either."""
    number = element_type(dtype)
    info = [helper.make_tensor_value_info(name, number, ["a", "b"]) for name in "xy"]
    rows = helper.make_tensor_value_info("rows", TensorProto.INT64, ["c"])
    graph = helper.make_graph([helper.make_node("Gather", ["x", "rows"], ["y"])], "take", [info[0], rows], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    inner = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    facts: Any = SimpleNamespace(
        inputs=[
            TensorSpec(name="x", dtype=dtype, shape=["a", "b"]),
            TensorSpec(name="rows", dtype="int64", shape=["c"]),
        ],
        outputs=[TensorSpec(name="y", dtype=dtype, shape=["c", "b"])],
    )
    captures = Captures("take", inner, "cpu", lambda: inner, most) if most else None
    session = BoundSession("take", facts, inner, "cpu", captures)
    for turn in range(3):
        x = (np.arange(12, dtype=np.float32).reshape(4, 3) + turn).astype(
            np.float16 if dtype == "float16" else np.float32
        )
        feeds = {"x": x, "rows": np.array([3, 0])}
        assert np.array_equal(session.run(feeds)["y"], x[[3, 0]])
        _, held = session.run_held(feeds, {}, (), ("y",))
        assert held["y"].element_type() == number and np.array_equal(array_of(held["y"]), x[[3, 0]])


def test_the_gathering_model_is_what_onnx_would_write() -> None:
    import onnx

    model = onnx.load_from_string(gather_model(TensorProto.BFLOAT16))
    (node,) = model.graph.node
    assert (node.op_type, list(node.input), list(node.output)) == ("Gather", ["held", "rows"], ["taken"])
    types = [value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)]
    assert types == [TensorProto.BFLOAT16, TensorProto.INT64, TensorProto.BFLOAT16]
    assert not any(value.type.tensor_type.HasField("shape") for value in model.graph.input)
