"""Plans on the device, beside ONNX Runtime on the processor; and lanes, memory and CUDA graphs without any compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from compexport.errors import CompexportError
from engines.backends.cuda import Device
from engines.backends.cuda_lanes import Lanes
from engines.backends.cuda_memory import CudaMemory
from engines.backends.trt_engine import Plan
from engines.backends.trt_maker import PlanMaker
from engines.backends.trt_options import PlanOptions, Range
from engines.backends.trt_product import TENSORRT
from engines.backends.trt_session import PlanSession
from engines.bundle import Bundle
from engines.manifest import Cost, Graph, Parity, TensorSpec
from engines.runtime import Runtime
from tests.engines import plan_checks, plans
from tests.engines.fake_trt import ExecutionContextAllocationStrategy, ILogger
from tests.engines.plan_checks import CASCADES, ENCODERS
from tests.engines.test_trt import record
from tests.threads import in_threads

# TensorRT multiplies fp32 matrices in TF32, which keeps ten bits.
TOLERANCE = 2e-2


# --- plans ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundles(plan_backend: Any, device: Device, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """``bundles(name)``: one of ``plan_checks``, with plans for this device, made once."""
    there: dict[str, Bundle] = {}
    options = PlanOptions(
        batch=Range(1, 4, 16),
        length=Range(1, 8, 48),
        targets=(device.capability,) if plan_backend.product.targets else None,
    )

    def bundle(name: str) -> Bundle:
        if name not in there:
            maker = plan_backend.builder(options)
            assert isinstance(maker, PlanMaker)
            made = plan_checks.make(name, tmp_path_factory.mktemp("plans") / name.replace(" ", "-"))
            there[name] = plans.planned(made, maker)
        return there[name]

    return bundle


@pytest.mark.parametrize("kind", ENCODERS)
def test_variants_say_what_ort_says(bundles: Any, plan_backend: Any, kind: str) -> None:
    plan_checks.check_variants(bundles(kind), plan_backend, TOLERANCE)


@pytest.mark.parametrize("kind", CASCADES)
def test_rows_leave_on_the_device(bundles: Any, plan_backend: Any, kind: str) -> None:
    """Every exit's answers; which rows leave where depends on rounding."""
    found = plan_backend.open_sessions(bundles(kind))
    for cascade in found.values():
        feeds = plan_checks.exits.feeds(7)
        run = cascade.run_exits(feeds, plan_checks.ExitRule(0.6))
        every = cascade.every_exit().run(feeds)["logits"]
        places = [cascade.exits.index(layer) for layer in run.exit_layer]
        np.testing.assert_allclose(run.logits, every[np.arange(7), places], atol=TOLERANCE)
    plan_checks.close_all(found)


@pytest.mark.parametrize("kind", ["decoders", "decoders that keep halves"])
def test_logits_are_those_of_ort(bundles: Any, plan_backend: Any, kind: str) -> None:
    plan_checks.check_logits(bundles(kind), plan_backend, 10 * TOLERANCE)


@pytest.mark.parametrize("way", plan_checks.WAYS)
def test_texts_are_whole(bundles: Any, plan_backend: Any, way: str) -> None:
    """The same again, and of the length that was asked for or ended; which tokens depends on rounding."""
    found, sessions = plan_checks.generators(bundles("decoders"), plan_backend)
    ids, mask = plan_checks.decoders.prompts(5)
    for generator in found.values():
        once, again = (generator.generate(ids, mask, options=plan_checks.WAYS[way]) for _ in range(2))
        assert [one.tokens for one in once] == [one.tokens for one in again]
        assert all(len(one.tokens) == 10 or one.why == "eos" for one in once)
    plan_checks.close_all(sessions)


def test_cuda_graphs_change_nothing(bundles: Any, plan_backend: Any) -> None:
    bundle = bundles("steps")
    with_graphs, without = plan_backend.open_sessions(bundle), plan_backend.open_sessions(bundle, provider="cuda")
    for name in with_graphs:
        for seed in range(5):
            feeds = plan_checks.exits.feeds(4, seed, longest=6)
            plan_checks.same(with_graphs[name].run(feeds), without[name].run(feeds), 1e-5)
    plan_checks.close_all({**with_graphs, "without": next(iter(without.values()))})


def test_threads_run_together(bundles: Any, plan_backend: Any) -> None:
    sessions = plan_backend.open_sessions(bundles("exits"))
    name, session = next(iter(sessions.items()))
    feeds = [plan_checks.exits.feeds(1 + number, number) for number in range(4)]
    expected = [session.run(given) for given in feeds]

    def work(number: int) -> None:
        for _ in range(10):
            plan_checks.same(session.run(feeds[number]), expected[number], 1e-4)

    in_threads(4, work)
    plan_checks.close_all({name: session, **sessions})


def test_a_runtime_answers_from_plans(bundles: Any, plan_backend: Any) -> None:
    with Runtime(bundles("exits"), backend=plan_backend.NAME) as runtime:
        assert len(runtime(["w1 w2", "w3"])) == 2


# --- lanes without a compiler --------------------------------------------------------------------------------------


class CopyingLibrary:
    """In place of TensorRT: its one engine copies ``x`` to ``y`` on the device, as work that can be captured."""

    ILogger, ExecutionContextAllocationStrategy = ILogger, ExecutionContextAllocationStrategy

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory

    def Runtime(self, logger: Any) -> Any:
        return SimpleNamespace(deserialize_cuda_engine=lambda plan: self)

    def create_runtime_config(self) -> Any:
        return SimpleNamespace(set_execution_context_allocation_strategy=lambda strategy: None)

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_aliased_input_tensor(self, name: str) -> None:
        return None

    def create_execution_context(self, runtime_config: Any) -> CopyingContext:
        return CopyingContext(self._memory)


class CopyingContext:
    """Copies by way of its scratch memory, so that two of them that shared it would show."""

    def __init__(self, memory: CudaMemory) -> None:
        self._memory = memory
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        self._scratch = 0

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self._shape = shape
        return True

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self._shape

    def get_max_output_size(self, name: str) -> int:
        return -1

    def update_device_memory_size_for_shapes(self) -> int:
        return 4 * int(np.prod(self._shape))

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0 and size >= self.update_device_memory_size_for_shapes()
        self._scratch = memory

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        size = self.update_device_memory_size_for_shapes()
        self._memory.copy(self._scratch, self._addresses["x"], size, stream_handle)
        self._memory.copy(self._addresses["y"], self._scratch, size, stream_handle)
        return True


@pytest.fixture
def copying(device: Device, tmp_path: Path) -> Iterator[PlanSession]:
    """A session of it, on the real device."""
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    memory = CudaMemory()
    tensors = [TensorSpec(name=name, dtype="float32", shape=["batch", "width"]) for name in ("x", "y")]
    profile = {"x": [[1, 1], [4, 1024], [64, 65536]]}
    facts = record(profiles=[profile], inputs=tensors[:1], outputs=tensors[1:])
    (tmp_path / "g.plan").write_bytes(b"copy")
    plan = Plan(CopyingLibrary(memory), TENSORRT, "g", tmp_path / "g.plan", tmp_path / "g.onnx", facts, True)
    parity = Parity(max_abs=0, tolerance=1, shapes=[])
    graph = Graph(path="g.onnx", opset=18, inputs=tensors[:1], outputs=tensors[1:], cost=Cost(), parity=parity, key="k")
    session = PlanSession("g", graph, plan, [profile], Lanes(memory), cuda_graphs=True)
    yield session
    session.close()


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_graphs_replay_what_is_fed(copying: PlanSession) -> None:
    for seed in range(6):
        for shape in ((1, 100), (64, 4096)):
            x = numbers(seed, *shape)
            np.testing.assert_array_equal(copying.run({"x": x})["y"], x)
    (lane,) = copying._lanes._lanes
    assert len(lane.tenants[copying]._graphs._captured) == 2  # type: ignore[attr-defined]


def test_what_is_held_is_gathered_on_the_device(copying: PlanSession) -> None:
    for seed in range(4):
        x = numbers(seed, 48, 2048)
        rows = np.random.default_rng(seed).integers(0, 48, 64)
        _, held = copying.run_held({"x": x}, {}, (), ("y",))
        for _ in range(5):
            _, held = copying.run_held({}, {"x": held["y"]}, (), ("y",))
        taken = copying.take_rows(held["y"], rows)
        found, _ = copying.run_held({}, {"x": taken}, ("y",), ())
        np.testing.assert_array_equal(found["y"], x[rows])


def test_lanes_run_at_the_same_time(copying: PlanSession) -> None:
    """Threads that run, hold and gather, and use what others hold."""
    shared: dict[int, tuple[Any, np.ndarray]] = {}

    def work(number: int) -> None:
        for seed in range(30):
            x = numbers(100 * number + seed, 32, 1000 * (1 + seed % 3))
            _, held = copying.run_held({"x": x}, {}, (), ("y",))
            shared[number] = (held["y"], x)
            value, expected = shared[seed % (number + 1)] if seed % (number + 1) in shared else shared[number]
            rows = np.random.default_rng(seed).integers(0, 32, 16)
            found, _ = copying.run_held({}, {"x": copying.take_rows(value, rows)}, ("y",), ())
            np.testing.assert_array_equal(found["y"], expected[rows])

    in_threads(6, work)


def test_a_device_that_is_full_says_so(device: Device) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="cuda-python is not installed")
    with pytest.raises(CompexportError, match="the GPU's memory is full: got 1073741824.0 MiB more asked for"):
        CudaMemory().allocate(1 << 50)
