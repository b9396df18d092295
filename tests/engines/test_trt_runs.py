"""How the TensorRT session uses the device: graphs, lanes, scratch memory, what is held, what fails. Over doubles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compexport.errors import BundleError, CompexportError, InputError
from engines.backends import cuda_pool, trt_graphs, trt_tensors
from engines.backends.cuda_lanes import Lanes
from engines.backends.cuda_memory import CudaMemory, DeviceLost, OutOfMemory
from engines.backends.cuda_pool import Staging, size_class
from engines.backends.trt_engine import Plan
from engines.backends.trt_product import TENSORRT, TENSORRT_RTX, Product
from engines.backends.trt_session import PlanSession
from engines.backends.trt_tensors import HeldTensor, runs_of
from engines.manifest import Cost, Graph, Parity, TensorSpec
from tests.engines import toys
from tests.engines.fake_cuda import FakeCuda, Misuse, Work
from tests.engines.fake_trt import Context as FakeContext
from tests.engines.fake_trt import Engine, Library, plan_bytes
from tests.engines.test_trt import record
from tests.threads import in_threads

HEAD = '<ir_version: 10, opset_import: ["" : 18]>\n'
# What is held of x is x + z, and what is asked for is its sum by row.
ADD = (
    HEAD
    + """g (float[batch, width] x, float[batch, width] z) => (float[batch, width] y, float[batch] total) {
    y = Add (x, z)
    one = Constant <value_ints = [1]> ()
    total = ReduceSum <keepdims = 0> (y, one)
}"""
)
PROFILE = {"x": [[1, 1], [2, 4], [8, 16]], "z": [[1, 1], [2, 4], [8, 16]]}


class Device:
    """A device with nothing open, and what opens plans on it."""

    def __init__(self, folder: Path, product: Product = TENSORRT, limit: int = 1 << 24, most: int = 8) -> None:
        self.cuda = FakeCuda(limit)
        self.product = product
        self.library = Library(self.cuda, captures=product is TENSORRT_RTX)
        self.lanes = Lanes(CudaMemory(self.cuda), most)
        self._folder, self._opened = folder, 0

    def open(
        self,
        model: str = ADD,
        *,
        cuda_graphs: bool = True,
        dtypes: dict[str, str] | None = None,
        profiles: Any = (PROFILE,),
        **facts: Any,
    ) -> PlanSession:
        """``dtypes``: of tensors in the plan, where they differ from the graph that stands in."""
        self._opened += 1
        path = self._folder / f"g{self._opened}.onnx"
        parsed = onnx.parser.parse_model(model)
        onnx.save(parsed, path)
        found = [toys.specs(values) for values in (parsed.graph.input, parsed.graph.output)]
        inputs, outputs = (
            [s.model_copy(update={"dtype": (dtypes or {}).get(s.name, s.dtype)}) for s in specs] for specs in found
        )
        plan = path.with_suffix(".plan")
        plan.write_bytes(plan_bytes(path, inputs, outputs, profiles=list(profiles), **facts))
        facts_of = record(profiles=list(profiles), inputs=inputs, outputs=outputs)
        opened = Plan(self.library, self.product, "g", plan, path, facts_of, cuda_graphs)
        captured = cuda_graphs and not self.product.captures
        return PlanSession("g", graph(inputs, outputs), opened, list(profiles), self.lanes, cuda_graphs=captured)

    @property
    def engine(self) -> Engine:
        """That which was opened last."""
        return self.library.engines[-1]

    def count(self, name: str) -> int:
        return self.cuda.calls.get(name, 0)


def graph(inputs: list[TensorSpec], outputs: list[TensorSpec]) -> Graph:
    parity = Parity(max_abs=0, tolerance=1, shapes=[])
    return Graph(path="g.onnx", opset=18, inputs=inputs, outputs=outputs, cost=Cost(), parity=parity, key="k")


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    """One on which at the end of the test nothing is left."""
    there = Device(tmp_path)
    yield there
    assert not any(there.cuda.left.values()), there.cuda.left


def numbers(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9, 9, shape).astype(np.float32)


def feeds(batch: int = 2, width: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": numbers(batch, width, seed=seed), "z": numbers(batch, width, seed=seed + 1)}


# --- CUDA graphs ---------------------------------------------------------------------------------------------------


def test_runs_that_come_again_are_captured_and_replayed(device: Device) -> None:
    """The first is run, the second captured, and all later ones replayed, with what is fed to them."""
    session, pinned = device.open(), set()
    for seed in range(5):
        given = feeds(seed=seed)
        np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])
        pinned.add(device.count("cudaHostAlloc"))
    assert (device.count("cudaStreamBeginCapture"), device.count("cudaGraphLaunch")) == (1, 3)
    assert len(pinned) == 1
    session.close()


def test_each_shape_has_a_graph_and_the_longest_unused_go(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_graphs, "MOST_GRAPHS", 2)
    session = device.open()
    for _ in range(3):
        for batch in (2, 1):
            session.run(feeds(batch))
    assert (device.count("cudaStreamBeginCapture"), device.count("cudaGraphLaunch")) == (2, 2)
    session.run(feeds(2))  # so that the graph of one row is the one that was not used for longest
    for _ in range(3):
        session.run({"x": numbers(2, 3), "z": numbers(2, 3)})
    assert device.cuda.left["graphs"] == 2
    launched = device.count("cudaGraphLaunch")
    session.run(feeds(2))
    assert device.count("cudaGraphLaunch") == launched + 1
    session.run(feeds(1))
    assert device.count("cudaGraphLaunch") == launched + 1
    given = feeds(1, seed=8)
    np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])
    session.close()


def test_a_graph_goes_only_for_a_run_that_comes_as_often(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_graphs, "MOST_GRAPHS", 1)
    session = device.open()
    for _ in range(6):
        session.run(feeds(2))
    assert (device.count("cudaStreamBeginCapture"), device.count("cudaGraphLaunch")) == (1, 4)
    for runs in range(1, 5):
        session.run(feeds(1))
        assert device.count("cudaStreamBeginCapture") == 1, runs
    session.run(feeds(1))
    session.run(feeds(1))
    assert (device.count("cudaStreamBeginCapture"), device.count("cudaGraphLaunch")) == (2, 5)
    session.close()


def test_a_graph_that_is_under_way_ends_before_it_goes(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_graphs, "MOST_GRAPHS", 1)
    session = device.open()
    for batch in (3, 2, 3, 2):
        for _ in range(12):
            session.run_held(feeds(batch), {}, (), ("y",))  # nothing waits
    assert device.count("cudaStreamBeginCapture") > 2 and device.cuda.left["graphs"] == 1
    session.close()


def test_arrays_on_their_way_are_waited_for_at_last(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_pool, "_STAGED_PIECES", 8)
    session = device.open(cuda_graphs=False)
    for _ in range(20):
        session.run_held(feeds(), {}, (), ("y",))
    assert device.cuda.left["pinned"] == 8 and device.count("cudaStreamSynchronize") == 4
    session.close()


def test_outputs_that_fill_what_may_be_on_its_way_come_out_as_they_are(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait between two copies out must not hand the memory of the first to the second."""
    session, given = device.open(cuda_graphs=False), feeds()
    for pieces in (1, 2, 3, 4):
        monkeypatch.setattr(cuda_pool, "_STAGED_PIECES", pieces)
        found = session.run(given)
        np.testing.assert_array_equal(found["y"], given["x"] + given["z"])
        np.testing.assert_array_equal(found["total"], (given["x"] + given["z"]).sum(axis=1))
    session.close()


def test_steps_over_what_is_held_find_their_addresses_again(device: Device) -> None:
    """A loop that gives each step what the last one made, as step engines do."""
    session = device.open()
    for _ in range(3):
        given = feeds()
        expected = given["x"].copy()
        _, held = session.run_held(given, {}, (), ("y",))
        expected += given["z"]
        for _ in range(6):
            _, held = session.run_held({"z": given["z"]}, {"x": held["y"]}, (), ("y",))
            expected += given["z"]
        found, _ = session.run_held({"z": given["z"]}, {"x": held["y"]}, ("y",), ())
        np.testing.assert_array_equal(found["y"], expected + given["z"])
    assert device.count("cudaGraphLaunch") >= 12
    del held
    session.close()


def test_larger_scratch_memory_ends_what_knew_the_smaller(device: Device) -> None:
    session, other = device.open(), device.open()
    for _ in range(3):
        session.run(feeds())
    assert device.cuda.left["graphs"] == 1
    other.run(feeds(8, 16))
    assert device.cuda.left["graphs"] == 0
    for seed in range(3):
        given = feeds(seed=seed)
        np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])
    session.close()
    other.close()


def test_graphs_can_be_left_out(device: Device) -> None:
    session = device.open(cuda_graphs=False)
    for _ in range(3):
        session.run(feeds())
    assert device.count("cudaStreamBeginCapture") == 0
    session.close()


def test_an_engine_that_cannot_be_captured_runs_without(device: Device) -> None:
    device.cuda.uncapturable = True
    session = device.open()
    for seed in range(4):
        given = feeds(seed=seed)
        np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])
    assert device.count("cudaStreamBeginCapture") == 1
    session.close()


@pytest.mark.parametrize(("cuda_graphs", "strategy"), [(True, "WHOLE_GRAPH_CAPTURE"), (False, "DISABLED")])
def test_rtx_makes_its_own_graphs(tmp_path: Path, cuda_graphs: bool, strategy: str) -> None:
    device = Device(tmp_path, TENSORRT_RTX)
    session = device.open(cuda_graphs=cuda_graphs)
    for _ in range(3):
        session.run(feeds())
    assert device.engine.graph_strategy is not None and device.engine.graph_strategy.name == strategy
    assert device.count("cudaStreamBeginCapture") == 0
    session.close()


# --- what is held --------------------------------------------------------------------------------------------------


def test_rows_are_taken_on_the_device(device: Device) -> None:
    session = device.open()
    given = feeds(5)
    _, held = session.run_held(given, {}, (), ("y",))
    waits = device.count("cudaStreamSynchronize")
    rows = np.array([4, 0, 1, 2, 2])
    taken = session.take_rows(held["y"], rows)
    assert device.count("cudaStreamSynchronize") == waits and device.cuda.downloaded == 0
    zeros = np.zeros_like(given["z"])
    found, _ = session.run_held({"z": zeros}, {"x": taken}, ("y",), ())
    np.testing.assert_array_equal(found["y"], (given["x"] + given["z"])[rows])
    assert session.take_rows(taken, np.arange(5)) is taken
    assert session.take_rows(taken, np.arange(0)).shape == (0, 4)
    for wrong in (np.array([5]), np.array([-1])):
        with pytest.raises(CompexportError, match="g: rows of what is held: got .*, expected 0 to 4"):
            session.take_rows(taken, wrong)
    del held, taken
    session.close()


@pytest.mark.parametrize(
    ("rows", "runs"), [([], []), ([3], [(0, 3, 1)]), ([0, 1, 4, 4, 5], [(0, 0, 2), (2, 4, 1), (3, 4, 2)])]
)
def test_rows_that_follow_each_other_are_one_copy(rows: list[int], runs: list[tuple[int, int, int]]) -> None:
    assert runs_of(np.array(rows, np.int64)) == runs


def test_memory_of_what_is_dropped_is_used_again(device: Device) -> None:
    session = device.open(cuda_graphs=False)
    for width in (4, 5, 6, 4):  # all of one class of sizes
        _, held = session.run_held(feeds(2, width), {}, (), ("y",))
        before = device.count("cudaMalloc")
        _, held = session.run_held(feeds(2, width), {}, (), ("y",))
    assert device.count("cudaMalloc") == before
    del held
    session.close()


def test_rows_of_the_last_axis_come_out_alone(device: Device) -> None:
    session = device.open()
    given = feeds(4)
    _, held = session.run_held(given, {}, (), ("y",))
    before = device.cuda.downloaded
    np.testing.assert_array_equal(
        session.fetch_rows(held["y"], np.array([3, 0, 1])), (given["x"] + given["z"])[[3, 0, 1]]
    )
    assert device.cuda.downloaded - before == 3 * 4 * 4
    with pytest.raises(CompexportError, match="g: rows of what is held: got 0 to 4, expected 0 to 3"):
        session.fetch_rows(held["y"], np.array([0, 4]))
    del held
    session.close()


@given(st.integers(1, 1 << 34))
def test_classes_of_sizes(size: int) -> None:
    found = size_class(size)
    assert size <= found <= max(512, size + size // 4 + 512) and found % 512 == 0 and size_class(found) == found


def test_an_output_may_lie_where_an_input_does(device: Device) -> None:
    session = device.open(aliases={"y": "x"})
    for _ in range(3):
        given = feeds()
        _, held = session.run_held(given, {}, (), ("y",))
        found, again = session.run_held({"z": given["z"]}, {"x": held["y"]}, ("total",), ("y",))
        np.testing.assert_array_equal(found["total"], (given["x"] + 2 * given["z"]).sum(axis=1))
        assert again["y"].block is held["y"].block
        np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])
    del held, again
    session.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_halves_stay_on_the_device_and_come_out_as_float32(device: Device, dtype: str) -> None:
    session = device.open(dtypes={"x": dtype, "z": dtype, "y": dtype})
    fed = np.float32 if dtype == "bfloat16" else np.float16
    given = {name: array.astype(fed) for name, array in feeds().items()}
    expected = (given["x"] + given["z"]).astype(np.float32)  # whole numbers, exact in both
    for again in (given, {name: array.astype(np.float32) for name, array in given.items()}):  # as it came out
        found, held = session.run_held(again, {}, ("total",), ("y",))
        np.testing.assert_array_equal(found["total"], expected.sum(axis=1))
    _, held = session.run_held(given, {}, (), ("y",))
    assert held["y"].dtype == dtype and held["y"].size_bytes == 2 * 8
    taken = session.take_rows(held["y"], np.array([1, 0]))
    found, _ = session.run_held({"z": np.zeros((2, 4), fed)}, {"x": taken}, ("y", "total"), ())
    assert found["y"].dtype == np.float32
    np.testing.assert_array_equal(found["y"], expected[::-1])
    np.testing.assert_array_equal(session.run(given)["total"], expected.sum(axis=1))
    del held, taken
    session.close()


@pytest.mark.parametrize("value", [1.0, -0.0, 3.14159, 1e-40, np.inf, np.nan, 65535.9, 1.00390625, 1.01171875])
def test_rounding_to_bfloat16_is_to_the_nearest_even(value: float) -> None:
    import torch

    array = np.array([value], np.float32)
    expected = torch.tensor(array).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    found = trt_tensors.stored(array, "bfloat16")
    both = [float((bits.astype(np.uint32) << 16).view(np.float32)[0]) for bits in (found, expected)]
    np.testing.assert_equal(*both)


# --- threads -------------------------------------------------------------------------------------------------------


def test_threads_run_on_lanes_of_their_own(device: Device) -> None:
    """While one thread has a lane, another gets another, with a context and scratch memory of its own."""
    session = device.open()
    session.run(feeds())
    assert (device.cuda.left["streams"], len(device.engine.made)) == (1, 1)
    with device.lanes.lent():
        session.run(feeds())
        assert (device.cuda.left["streams"], len(device.engine.made)) == (2, 2)
    session.run(feeds())
    assert device.cuda.left["streams"] == 2
    session.close()


def test_a_thread_has_the_lane_that_it_had(device: Device) -> None:
    """Where its graphs are."""
    session = device.open()
    with device.lanes.lent(), device.lanes.lent():
        pass
    for _ in range(5):
        session.run(feeds())
    assert (device.count("cudaStreamBeginCapture"), device.count("cudaGraphLaunch")) == (1, 3)
    session.close()


def test_what_one_thread_holds_another_may_use(device: Device) -> None:
    """On another lane, which waits for it; and its memory is handed out again only after that."""
    session = device.open(cuda_graphs=False)
    given, zeros = feeds(), np.zeros((2, 4), np.float32)
    for _ in range(3):
        _, held = session.run_held(given, {}, (), ("y",))
        with device.lanes.lent():  # the lane that made it
            _, moved = session.run_held({"z": zeros}, {"x": held["y"]}, (), ("y",))
            taken = session.take_rows(held["y"], np.array([1, 0]))
        del held
        _, other = session.run_held(feeds(seed=5), {}, (), ("y",))
        for value, expected in ((moved["y"], given["x"] + given["z"]), (taken, (given["x"] + given["z"])[::-1])):
            found, _ = session.run_held({"z": zeros}, {"x": value}, ("y",), ())
            np.testing.assert_array_equal(found["y"], expected)
    del moved, taken, other, value
    session.close()


def test_a_value_that_others_use_often_keeps_one_event_for_each_lane(device: Device) -> None:
    session = device.open(cuda_graphs=False)
    _, held = session.run_held(feeds(), {}, (), ("y",))
    with device.lanes.lent():  # the lane that made it
        for _ in range(50):
            session.run_held({"z": numbers(2, 4)}, {"x": held["y"]}, ("total",), ())
    assert len(held["y"].block.place.users) == 1 and device.cuda.left["events"] < 8
    del held
    session.close()


def test_memory_that_moved_on_is_handed_out_after_all_work_with_it(device: Device) -> None:
    """An output that lies where an input does, of a run on another lane than the input's."""
    session = device.open(cuda_graphs=False, aliases={"y": "x"})
    given, ones = feeds(), np.ones((2, 4), np.float32)
    _, held = session.run_held(given, {}, (), ("y",))
    with device.lanes.lent() as home:
        _, held = session.run_held({"z": ones}, {"x": held["y"]}, (), ("y",))
        _, other = session.run_held({"z": ones}, {"x": held["y"]}, (), ("y",))  # where ``held`` is, of its home's pool
        del held, other
        blocks = [home.pool.take(32) for _ in range(8)]
        for block in blocks:
            device.cuda.give(home.stream, Work(lambda: None, (), [(block.address, 32)]))
    del blocks, block
    session.close()


def test_more_threads_than_lanes_take_turns(tmp_path: Path) -> None:
    device = Device(tmp_path, most=2)
    session = device.open()

    def work(number: int) -> None:
        for seed in range(5):
            given = feeds(1 + number % 3, seed=seed)
            np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])

    in_threads(6, work)
    assert device.cuda.left["streams"] <= 2
    session.close()
    assert not any(device.cuda.left.values())


def test_closing_waits_for_runs_and_refuses_later_ones(device: Device) -> None:
    session = device.open()
    refused = []

    def work(number: int) -> None:
        for _ in range(20):
            if number == 0:
                session.close()
                return
            try:
                session.run(feeds(seed=number))
            except CompexportError as error:
                refused.append(str(error))
                return

    in_threads(4, work)
    assert {line.removeprefix("g: ") for line in refused} <= {
        f"{what} closed; load the bundle again" for what in ("the engine is", "the engines are")
    }
    with pytest.raises(CompexportError, match="g: the engine is closed; load the bundle again"):
        session.run(feeds())
    session.close()


Step = tuple[int, int, int, int]  # what is done, with which session, rows, and numbers


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.tuples(*[st.integers(0, 5)] * 4), max_size=8), min_size=1, max_size=3), st.booleans())
def test_whatever_threads_do_nothing_is_left_or_shared(scripts: list[list[Step]], cuda_graphs: bool) -> None:
    """Runs, what is held, rows of it, values of other threads, closing: right results, or closed, and no misuse."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        device = Device(Path(folder), most=2)
        sessions = [device.open(cuda_graphs=cuda_graphs) for _ in range(2)]
        values: list[tuple[HeldTensor, np.ndarray]] = []  # of all threads, and what they should be

        def run(step: Step) -> None:
            kind, which, seed, pick = step
            session = sessions[which % 2]
            if kind == 5 and which == 5:
                return session.close()
            if kind in (2, 3, 4) and values:
                held, array = values[pick % len(values)]
                if kind == 2:
                    rows = np.random.default_rng(seed).integers(0, len(array), 1 + pick)
                    return values.append((session.take_rows(held, rows), array[rows]))
                z = numbers(*array.shape, seed=seed)
                found, kept = session.run_held({"z": z}, {"x": held}, ("y",) if kind == 3 else (), ("y",))
                np.testing.assert_array_equal(found.get("y", array + z), array + z)
                return values.append((kept["y"], array + z))
            fed = feeds(1 + pick, 4, seed)
            if kind == 1:
                _, kept = session.run_held(fed, {}, (), ("y",))
                return values.append((kept["y"], fed["x"] + fed["z"]))
            np.testing.assert_array_equal(session.run(fed)["y"], fed["x"] + fed["z"])

        def work(number: int) -> None:
            for step in scripts[number]:
                try:
                    run(step)
                except CompexportError as error:
                    assert "closed" in str(error)
                if len(values) > 6:
                    values.clear()

        in_threads(len(scripts), work)
        for session in sessions:
            session.close()
        assert not any(device.cuda.left.values()), device.cuda.left


# --- what fails ----------------------------------------------------------------------------------------------------


def test_shapes_outside_the_plan_name_the_range(device: Device) -> None:
    session = device.open(profiles=[PROFILE, {"x": [[1, 32]] * 3, "z": [[1, 32]] * 3}])
    line = r"^g: shapes outside the plan: got x \[9, 4\], expected x \[1, 1\] to \[8, 16\] or x \[1, 32\] to"
    with pytest.raises(InputError, match=line):
        session.run(feeds(9))
    both = {"x": numbers(1, 32), "z": numbers(1, 16)}
    with pytest.raises(InputError, match=r"got x \[1, 32\], z \[1, 16\], expected x \[1, 1\] to \[8, 16\], z"):
        session.run_held(both, {}, ("y",), ())
    session.run(feeds(1, 32))
    assert len(device.engine.made) == 1
    session.run(feeds())
    assert len(device.engine.made) == 2, "one for each profile"
    session.close()


def test_a_full_device_gives_back_what_is_not_used_and_then_says_so(tmp_path: Path) -> None:
    device = Device(tmp_path, limit=1 << 22)
    wide = {"x": [[1, 1], [2, 4], [512, 256]], "z": [[1, 1], [2, 4], [512, 256]]}
    session = device.open(profiles=[wide], cuda_graphs=False)
    for rows in range(16, 256, 16):  # each with more scratch memory than the one before
        _, held = session.run_held(feeds(rows, 64), {}, (), ("y",))
    assert device.count("cudaFree") > 0
    with pytest.raises(OutOfMemory, match=r"^the GPU's memory is full: got 10.0 MiB more asked for; ask for less"):
        session.run(feeds(512, 256))
    del held
    given = feeds(4, 8)
    np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])
    session.close()
    assert not any(device.cuda.left.values())


def test_pinned_memory_that_is_idle_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = FakeCuda()
    memory = CudaMemory(cuda)
    staging = Staging(memory, lambda: staging.settle())
    staging.room(1024)
    staging.settle()

    def allocated(size: int) -> int:
        if cuda.left["pinned"]:
            raise OutOfMemory("pinned memory of the host is full")
        return CudaMemory.allocate_pinned(memory, size)

    monkeypatch.setattr(memory, "allocate_pinned", allocated)
    staging.room(4096)
    with pytest.raises(OutOfMemory):
        staging.room(1024)  # the other piece is under way
    staging.close()
    assert not cuda.left["pinned"]


def test_lanes_that_nobody_has_give_back_what_they_keep(tmp_path: Path) -> None:
    """For a lane that is short of memory."""
    device = Device(tmp_path, limit=1 << 22)
    wide = {"x": [[1, 1], [2, 4], [512, 256]], "z": [[1, 1], [2, 4], [512, 256]]}
    session, other = (device.open(profiles=[wide], cuda_graphs=False) for _ in range(2))
    with device.lanes.lent(), device.lanes.lent():
        pass
    session.run(feeds(200, 64))
    session.close()
    given = feeds(400, 64)

    def work(number: int) -> None:
        np.testing.assert_array_equal(other.run(given)["y"], given["x"] + given["z"])

    in_threads(1, work)  # on the other lane, which is unused for longer
    assert device.count("cudaFree") > 0
    other.close()
    assert not any(device.cuda.left.values())


def test_a_lost_device_is_one_line_each_time(device: Device) -> None:
    session = device.open()
    session.run(feeds())
    device.cuda.is_lost = True
    for _ in range(2):
        with pytest.raises(DeviceLost, match="^the GPU is lost: cuda.* failed: got cudaErrorIllegalAddress; start the"):
            session.run(feeds())
    session.close()
    device.cuda.__init__()  # type: ignore[misc]  # nothing of it can be given back


def test_an_engine_that_fails_gives_the_librarys_reason(device: Device) -> None:
    session = device.open()
    device.engine.failing = True
    with pytest.raises(CompexportError, match=r"^g: the engine failed: got Error Code 1: Cask \(an engine that"):
        session.run(feeds())
    device.engine.failing = False
    session.run(feeds())
    session.close()


def test_what_is_held_of_closed_engines_is_refused(device: Device, tmp_path: Path) -> None:
    session = device.open()
    _, held = session.run_held(feeds(), {}, (), ("y",))
    session.close()
    device.lanes = Lanes(CudaMemory(device.cuda))
    later = device.open()
    with pytest.raises(CompexportError, match="g: what is held belongs to engines that are closed"):
        later.run_held({"z": numbers(2, 4)}, {"x": held["y"]}, ("y",), ())
    later.close()


def test_shapes_that_were_refused_are_asked_for_again(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was inferred for those before them says nothing of these."""
    session = device.open()
    session.run(feeds(1))
    with monkeypatch.context() as patch:
        patch.setattr(FakeContext, "infer_shapes", lambda self: ["z"])
        for _ in range(2):
            with pytest.raises(CompexportError, match="^g: shapes that do not follow from the inputs: got z$"):
                session.run(feeds(8))
    given = feeds(8)
    np.testing.assert_array_equal(session.run(given)["y"], given["x"] + given["z"])
    session.close()


def test_shapes_that_depend_on_values_are_refused(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "is_shape_inference_io", lambda self, name: name == "z")
    with pytest.raises(BundleError, match="^g: shapes depend on the values of z$"):
        device.open()


# --- the double ----------------------------------------------------------------------------------------------------


def test_the_double_sees_two_streams_at_the_same_memory() -> None:
    cuda = FakeCuda()
    memory = CudaMemory(cuda)
    address, streams = memory.allocate(64), [memory.stream(), memory.stream()]
    cuda.give(streams[0], Work(lambda: None, (), [(address, 64)]))
    with pytest.raises(Misuse, match="two streams use the same memory at the same time"):
        cuda.give(streams[1], Work(lambda: None, [(address, 8)], ()))
    event = memory.event()
    memory.record(event, streams[0])
    memory.wait_for(streams[1], event)
    cuda.give(streams[1], Work(lambda: None, [(address, 8)], ()))
    with pytest.raises(Misuse, match="memory given back that work under way uses"):
        memory.free(address)
    memory.wait(streams[1])
    memory.free(address)


def test_the_double_sees_memory_that_is_not_there_or_not_allowed() -> None:
    cuda = FakeCuda()
    memory = CudaMemory(cuda)
    stream, place, pinned = memory.stream(), memory.allocate(64), memory.allocate_pinned(64)
    for wrong in (
        lambda: memory.copy(place, place + 32, 33, stream),
        lambda: memory.copy(place, place + 16, 32, stream),
        lambda: memory.upload(place, place, 8, stream),
        lambda: memory.upload(place, numbers(8).ctypes.data, 8, stream),
        lambda: memory.free(pinned),
        lambda: memory.free(place + 1),
    ):
        with pytest.raises(Misuse):
            wrong()
    memory.begin_capture(stream)
    for forbidden in (lambda: memory.allocate(8), lambda: memory.wait(stream), lambda: memory.free(place)):
        with pytest.raises(Misuse, match="during a capture"):
            forbidden()
    memory.upload(place, pinned, 8, stream)
    graph_of_it = memory.end_capture(stream)
    memory.launch(graph_of_it, stream)
    with pytest.raises(Misuse, match="a graph ends that is under way"):
        memory.end_graph(graph_of_it)
    memory.wait(stream)
    memory.end_graph(graph_of_it)
    with pytest.raises(CompexportError, match="the GPU's memory is full: got 2048.0 MiB"):
        memory.allocate(1 << 31)
