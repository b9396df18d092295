"""TensorRT without TensorRT: shapes, records, devices, options, and processes that die."""

from __future__ import annotations

import ctypes
import importlib
import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnx.parser
import pytest

from compexport.errors import BundleError, CompexportError, DependencyError, InputError
from engines import backends
from engines.backends import cuda, cuda_memory, trt, trt_process
from engines.backends.trt_build import Request, _monitor, build
from engines.backends.trt_maker import with_ranges
from engines.backends.trt_options import PlanOptions, Range, parsed_range, parsed_targets
from engines.backends.trt_plan import PlanRecord, read_record
from engines.backends.trt_process import PlanProcess
from engines.backends.trt_product import TENSORRT, Product
from engines.backends.trt_profiles import profiles_of, shortest_text
from engines.backends.trt_recipe import RecipeMaker
from engines.bundle import Bundle
from engines.manifest import TensorSpec
from tests.engines import fake_cuda, trt_modules

GOLDEN = Path(__file__).parents[1] / "data" / "bundle-v1"
ADA = cuda.Device(0, "NVIDIA GeForce RTX 4090", "sm89")
IDS = TensorSpec(name="input_ids", dtype="int64", shape=["batch", "sequence"])


# --- shapes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "sizes"), [("1:8:32", (1, 8, 32)), ("7", (7, 7, 7)), ("1,2,3", (1, 2, 3))])
def test_a_range(text: str, sizes: tuple[int, int, int]) -> None:
    assert parsed_range("batch", text) == Range(*sizes)


@pytest.mark.parametrize("text", ["8:1:32", "0:1:2", "1:2", "1:2:3:4", "a", "", "1:-2:3", "1.5"])
def test_a_range_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match=rf"--length: got '{text}', expected"):
        parsed_range("length", text)


def test_targets_are_sorted_and_of_one_form() -> None:
    assert parsed_targets("sm120, SM86,sm86") == ("sm86", "sm120")
    with pytest.raises(InputError, match=r"--target: got '8.6', expected compute capabilities like sm86,sm89"):
        parsed_targets("8.6")


def test_axes_of_one_name_get_one_size() -> None:
    hidden = TensorSpec(name="previous", dtype="float32", shape=["batch", "sequence", 32])
    rows = TensorSpec(name="rows", dtype="int64", shape=["kept"])
    (profile,) = profiles_of([IDS, hidden, rows], Range(1, 2, 4), Range(8, 16, 64))
    assert profile == {
        "input_ids": [[1, 8], [2, 16], [4, 64]],
        "previous": [[1, 8, 32], [2, 16, 32], [4, 64, 32]],
        "rows": [[1], [2], [4]],
    }


@pytest.mark.parametrize("length", [Range(1, 8, 40), Range(5, 5, 5), Range(1, 1, 1)])
def test_a_decoder_reads_a_prompt_and_then_single_tokens(length: Range) -> None:
    mask = TensorSpec(name="attention_mask", dtype="int64", shape=["batch", "total"])
    past = TensorSpec(name="past_key_values.0.key", dtype="float32", shape=["batch", 4, "past", 8])
    prompt, token, more = profiles_of([IDS, mask, past], Range(1, 2, 4), length)
    for profile in (prompt, token, more):
        for end in range(3):
            read, kept = profile["input_ids"][end][1], profile["past_key_values.0.key"][end][2]
            assert profile["attention_mask"][end][1] == read + kept
        assert all(
            low <= usual <= high for shapes in profile.values() for low, usual, high in zip(*shapes, strict=True)
        )
    assert [shape[1] for shape in prompt["input_ids"]] == [length.low, length.usual, length.high]
    assert {shape[1] for shape in token["input_ids"]} == {1}
    assert [shape[1] for shape in more["input_ids"]] == [1, length.usual, length.high]
    assert shortest_text([IDS, mask, past], [prompt, token, more]) == length.low


@pytest.mark.parametrize("length", [Range(16, 32, 64), Range(1, 1, 1)])
def test_a_second_text_grows_from_its_first_token_whatever_is_read(length: Range) -> None:
    """The length is that of the text read; a cached step always reads one token, after as few as one."""
    ids = TensorSpec(name="input_ids", dtype="int64", shape=["batch", "decoder_sequence"])
    read = TensorSpec(name="encoder_attention_mask", dtype="int64", shape=["batch", "encoder_sequence"])
    past = TensorSpec(
        name="past_key_values.0.decoder.key", dtype="float32", shape=["batch", 4, "past_decoder_sequence", 8]
    )
    (first,) = profiles_of([ids, read], Range(1, 2, 4), length)
    (later,) = profiles_of([ids, read, past], Range(1, 2, 4), length)
    for profile in (first, later):
        assert [shape[1] for shape in profile["encoder_attention_mask"]] == [length.low, length.usual, length.high]
    assert [shape[1] for shape in first["input_ids"]] == [1, 1, length.high]
    assert [shape[1] for shape in later["input_ids"]] == [1, 1, 1]
    lengths = [shape[2] for shape in later[past.name]]
    assert lengths == sorted(lengths) and lengths[0] == 1 and lengths[2] == max(1, length.high - 1)


def test_rows_may_leave_whatever_the_smallest_batch() -> None:
    previous = TensorSpec(name="previous", dtype="float32", shape=["batch", "sequence", 32])
    past = TensorSpec(name="past_key_values.0.key", dtype="float32", shape=["batch", 4, "past", 8])
    for held in (previous, past):
        for profile in profiles_of([held], Range(4, 8, 16), Range(8, 8, 8)):
            assert [shape[0] for shape in profile[held.name]] == [1, 8, 16]
    (profile,) = profiles_of([IDS], Range(4, 8, 16), Range(8, 8, 8))
    assert [shape[0] for shape in profile["input_ids"]] == [4, 8, 16]


def test_an_axis_of_another_kind_is_named() -> None:
    with pytest.raises(InputError, match=r"an axis without a range: got frames, expected one of batch, kept, sequence"):
        profiles_of([TensorSpec(name="x", dtype="float32", shape=["batch", "frames"])], Range(1, 1, 1), Range(1, 1, 1))


def test_lengths_are_those_that_the_model_takes() -> None:
    assert with_ranges(PlanOptions(), 160).length == Range(1, 128, 160)
    assert with_ranges(PlanOptions(), 40).length == Range(1, 40, 40)
    assert with_ranges(PlanOptions(), None).length == Range(1, 128, 512)
    with pytest.raises(InputError, match="--length: got 1:128:512, expected at most 160 tokens"):
        with_ranges(PlanOptions(length=Range(1, 128, 512)), 160)


def test_options_survive_json() -> None:
    options = PlanOptions(Range(1, 2, 3), Range(4, 5, 6), ("sm86", "sm120"), workspace_mib=64, level=2, strip=True)
    assert PlanOptions.of(options.document()) == options
    assert PlanOptions.of(PlanOptions().document()) == PlanOptions()


# --- what a product does not have ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "options", "message"),
    [
        ("ort", PlanOptions(level=2), "--level: got the backend ort, expected trt or trt-rtx"),
        ("ort", PlanOptions(strip=True), "--strip-weights: got the backend ort"),
        ("ort", PlanOptions(targets=("sm86",)), "--target: got the backend ort"),
        ("ort", PlanOptions(workspace_mib=64), "--workspace-mib: got the backend ort"),
        ("trt", PlanOptions(targets=("sm86",)), "--target: got the backend trt, expected trt-rtx; plans fit the GPU"),
        ("trt-rtx", PlanOptions(hardware_compatible=True), "--hardware-compatible: got the backend trt-rtx"),
        ("trt-rtx", PlanOptions(plugins=True), "--plugins: got the backend trt-rtx, expected trt; TensorRT-RTX has no"),
        ("trt", PlanOptions(level=6), "--level: got 6, expected 0"),
    ],
)
def test_options_of_other_products(backend: str, options: PlanOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        backends.builder(backend, options)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the libraries were there."""
    monkeypatch.setattr(Product, "unavailable", lambda self: "")
    monkeypatch.setattr(Product, "version", lambda self: "11.4.0.106")


def test_weights_are_left_out_only_where_there_is_a_device(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "devices", list)
    with pytest.raises(DependencyError, match="--strip-weights: TensorRT-RTX leaves weights out only where it finds"):
        backends.builder("trt-rtx", PlanOptions(strip=True))
    monkeypatch.setattr(cuda, "devices", lambda: [ADA])
    assert backends.builder("trt-rtx", PlanOptions(strip=True)).options.strip


def test_targets_are_checked_before_anything_is_traced(
    installed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt_modules.write(tmp_path, "tensorrt_rtx", "class ComputeCapability:\n    SM120 = SM86 = SM89 = 0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    match = "--target: TensorRT-RTX 11.* does not know it: got sm999, expected one of sm86, sm89, sm120"
    with pytest.raises(InputError, match=match):
        backends.builder("trt-rtx", PlanOptions(targets=("sm89", "sm999")))
    assert backends.builder("trt-rtx", PlanOptions(targets=("sm89",))).targets == ["sm89"]
    # A library that cannot even be asked is told of by its first build.
    trt_modules.write(tmp_path, "tensorrt_rtx", trt_modules.MISSING_LIBRARY)
    assert backends.builder("trt-rtx", PlanOptions(targets=("sm999",))).targets == ["sm999"]


def test_missing_and_old_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.backends.trt_product.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"tensorrt_rtx is missing; pip install 'compexport\[rtx\]'"):
        backends.load("trt-rtx")
    assert backends.available()["trt"].startswith("tensorrt is missing")
    monkeypatch.setattr("engines.backends.trt_product.find_spec", lambda name: object())
    monkeypatch.setattr(Product, "version", lambda self: "10.13.2.6")
    with pytest.raises(DependencyError, match=r"TensorRT is too old: got 10.13.2.6, expected >= 11.2"):
        backends.load("trt")


def test_plans_are_for_the_device_that_is_there(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "devices", lambda: [ADA])
    made = backends.builder("trt", PlanOptions())
    assert (made.NAME, made.FOLDER) == ("trt", "engines/trt-sm89")
    assert backends.builder("trt-rtx").FOLDER == "engines/trt-rtx-sm86-sm89-sm120"
    monkeypatch.setattr(cuda, "devices", list)
    recipes = backends.builder("trt")
    assert recipes.NAME == "trt-recipe" and recipes.reason == "TensorRT compiles on a GPU only, and none is here"


def test_plugins_are_compiled_for_the_device_or_for_all(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "devices", lambda: [ADA])
    monkeypatch.setattr("engines.plugins.ptx.find_spec", lambda name: object())
    assert backends.builder("trt", PlanOptions(plugins=True)).kernels == 89
    assert backends.builder("trt", PlanOptions(plugins=True, hardware_compatible=True)).kernels == 80
    assert backends.builder("trt", PlanOptions()).kernels is None
    monkeypatch.setattr("engines.plugins.ptx.find_spec", lambda name: None)
    with pytest.raises(DependencyError, match=r"--plugins: the package triton is missing; pip install"):
        backends.builder("trt", PlanOptions(plugins=True))


# --- devices -------------------------------------------------------------------------------------------------------


class Driver:
    """The driver's interface with one device of compute capability 12.0, or one that says it has none."""

    def __init__(self, count: int = 1, fault: int = 0) -> None:
        self.count, self.fault = count, fault

    def cuInit(self, flags: int) -> int:
        return self.fault

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.count
        return 0

    def cuDeviceGet(self, handle: Any, index: int) -> int:
        handle._obj.value = index
        return 0

    def cuDeviceGetName(self, name: Any, size: int, handle: Any) -> int:
        name.value = b"NVIDIA GeForce RTX 5090"
        return 0

    def cuDeviceGetAttribute(self, value: Any, number: int, handle: Any) -> int:
        value._obj.value = {75: 12, 76: 0}[number]
        return 0


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    for driver, expected in (
        (Driver(), [cuda.Device(0, "NVIDIA GeForce RTX 5090", "sm120")]),
        (Driver(count=0), []),
        (Driver(fault=100), []),
    ):
        monkeypatch.setattr(ctypes, "CDLL", lambda name, driver=driver: driver)
        assert cuda.devices() == expected


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(
        DependencyError, match="an engine of TensorRT needs a CUDA device: got none; run it on a machine"
    ):
        cuda.require_device("an engine of TensorRT")


def test_opening_an_engine_without_a_device(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "devices", list)
    for backend in (trt.TRT, trt.RTX):
        message = f"an engine of {backend.product.title} needs a CUDA device"
        with pytest.raises(DependencyError, match=message):
            backend.device_name({})
        with pytest.raises(DependencyError, match=message):
            backend.open_sessions(Bundle.open(GOLDEN))


# --- records -------------------------------------------------------------------------------------------------------


def record(**changed: Any) -> PlanRecord:
    facts: dict[str, Any] = {
        "product": "trt",
        "graph": "r2",
        "graph_key": "k",
        "profiles": [{"input_ids": [[1, 1], [2, 2], [3, 3]]}],
        "inputs": [IDS],
        "outputs": [],
        "options": PlanOptions().document(),
        "version": "11.3.0.5",
        "platform": "linux-x86_64",
        "targets": ["sm89"],
        "plugins": [],
        "size_bytes": 1,
        "sha256": "0" * 64,
        "build_seconds": 1.0,
    }
    return PlanRecord(**{**facts, **changed})


HERE = {"product": "trt", "version": "11.3.0.5", "platform": "linux-x86_64", "graph_key": "k"}
PORTABLE = PlanOptions(version_compatible=True, hardware_compatible=True).document()


@pytest.mark.parametrize(
    ("changed", "got"),
    [
        ({"product": "trt-rtx"}, "a plan of trt-rtx"),
        ({"graph_key": "another"}, "a plan of another graph"),
        ({"platform": "windows-amd64"}, "a plan for windows-amd64"),
        ({"version": "11.3.0.4"}, "a plan of version 11.3.0.4"),
        ({"version": "11.4.0.1", "options": PORTABLE}, "a plan of version 11.4.0.1"),
        ({"version": "10.9.0.1", "options": PORTABLE}, "a plan of version 10.9.0.1"),
    ],
)
def test_a_plan_that_does_not_fit_says_why(changed: dict[str, Any], got: str) -> None:
    found = record(**changed).mismatch(**HERE)
    assert found is not None and found[0] == got


def test_plans_that_fit() -> None:
    assert record().mismatch(**HERE) is None
    assert record(version="11.2.0.1", options=PORTABLE).mismatch(**HERE) is None


@pytest.mark.parametrize(
    ("capability", "plain", "compatible"),
    [("sm89", True, True), ("sm75", False, False), ("sm86", False, True), ("sm120", False, True)],
)
def test_devices_that_a_plan_runs_on(capability: str, plain: bool, compatible: bool) -> None:
    device = cuda.Device(0, "some card", capability)
    assert record().runs_on(device) is plain
    assert record(options=PORTABLE).runs_on(device) is compatible


def test_a_recipe_is_made_anew_by_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(self: Path) -> bytes:
        return read(self) + (b"#" if self.name == "trt_profiles.py" else b"")

    maker, read = RecipeMaker(TENSORRT, PlanOptions(recipe=True), ""), Path.read_bytes
    before = maker.engine_key("k")
    assert maker.engine_key("k") == before
    monkeypatch.setattr(Path, "read_bytes", changed)
    assert maker.engine_key("k") != before


def test_a_record_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "r2.json").write_text(record().model_dump_json())
    assert read_record(tmp_path / "r2.json") == record()
    (tmp_path / "r2.json").write_text('{"format": 2}')
    with pytest.raises(BundleError, match=r"r2.json: not a PlanRecord: got"):
        read_record(tmp_path / "r2.json")


# --- processes -----------------------------------------------------------------------------------------------------


@pytest.fixture
def build_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """``build_with(source)``: a build whose library is that source."""

    def start(source: str) -> PlanProcess:
        trt_modules.write(tmp_path, "their_library", source)
        path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        monkeypatch.setenv("PYTHONPATH", path)
        request = Request("their_library", str(tmp_path / "r2.onnx"), str(tmp_path / "r2.plan"), [], [])
        return PlanProcess(request, "TensorRT 11.4")

    return start


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (trt_modules.ABORTING, r"a compiler process that died of SIGABRT, after 'Internal Error: check failed'"),
        (trt_modules.MISSING_LIBRARY, "ImportError: libnvinfer.so.11: cannot open shared object file"),
    ],
)
def test_a_library_that_fails_gives_one_line(build_with: Any, tmp_path: Path, source: str, reason: str) -> None:
    with pytest.raises(CompexportError, match=rf"^r2.onnx: TensorRT 11.4 cannot build it: got {reason}$"):
        build_with(source).run()
    assert not (tmp_path / "r2.plan").exists()


@pytest.mark.parametrize(("before", "after"), [("g ", "g g "), ("of another version", "g ")])
def test_timings_are_gone_on_with_or_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    trt_modules.write(tmp_path, "their_library", trt_modules.TIMING)
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 20]>\ng (float[2] x) => (float[2] y) { y = Abs(x) }'
    )
    monkeypatch.chdir(tmp_path)
    onnx.save(model, "g.onnx")
    Path("timing.cache").write_text(before)
    monkeypatch.syspath_prepend(tmp_path)
    asked = Request("their_library", "g.onnx", "g.plan", [], [], timing_cache="timing.cache")
    build(importlib.import_module("their_library"), asked, lambda stage, share: None, lambda: False)
    assert Path("timing.cache").read_text() == after


def test_a_build_that_does_not_listen_is_killed(build_with: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_process, "_GRACE_S", 0.2)
    process = build_with(trt_modules.DEAF)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            process.run()
        except CompexportError as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    deadline = time.monotonic() + 60
    while process._process is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.cancel()
    thread.join(60)
    assert not thread.is_alive() and "got cancelled" in str(failed[0])
    assert process._process.returncode is not None


def test_a_build_that_is_dead_already_is_cancelled_without_a_word(tmp_path: Path) -> None:
    """Its request, still on the way, can go nowhere."""
    request = Request("their_library", str(tmp_path / "r2.onnx"), str(tmp_path / "r2.plan"), [], [])
    building = PlanProcess(request, "TensorRT 11.4")
    with subprocess.Popen([sys.executable, "-c", ""], stdin=subprocess.PIPE, text=True) as process:
        process.wait()
        assert process.stdin is not None
        process.stdin.write("{}")
        building._process = process
        building.cancel()
        assert process.stdin.closed


def test_the_library_may_report_from_several_threads_at_once() -> None:
    others: list[threading.Thread] = []
    told: list[str] = []
    overlapping = threading.Event()

    def report(phase: str, share: float) -> None:
        told.append(phase)
        if not others:  # meanwhile another thread begins a phase, and has time to
            others.append(threading.Thread(target=monitor.phase_start, args=("inner", "outer", 2)))
            others[0].start()
            others[0].join(0.2)
            if len(told) > 1:
                overlapping.set()

    monitor = _monitor(SimpleNamespace(IProgressMonitor=object), report, lambda: False)
    monitor.phase_start("outer", "", 3)
    others[0].join(60)
    assert told == ["outer", "inner"] and not overlapping.is_set()
    assert monitor.step_complete("inner", 0) and told[2:] == ["inner"]


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.trt
@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed (make test-trt)")
@pytest.mark.skipif(bool(cuda.devices()), reason="there is a device")
def test_cuda_without_a_device_says_so() -> None:
    from engines.backends.cuda_memory import CudaMemory

    with pytest.raises(CompexportError, match="CUDA: cudaMalloc failed: got cudaError"):
        CudaMemory().allocate(4)
    with pytest.raises(CompexportError, match="CUDA: cudaStreamCreateWithFlags failed: got cudaError"):
        CudaMemory().stream()


@pytest.mark.trt
@pytest.mark.skipif(find_spec("cuda") is None, reason="cuda-python is not installed (make test-trt)")
def test_the_double_of_cuda_has_what_cuda_has() -> None:
    from cuda.bindings import runtime

    assert fake_cuda.differences(runtime) == []
    statuses = {status.name for status in runtime.cudaError_t}
    assert statuses >= cuda_memory._SHORT | cuda_memory._LOST
