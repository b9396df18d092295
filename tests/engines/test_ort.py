"""ONNX Runtime: one weights file for a family, sessions that agree with the graphs, and what is refused."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from compexport.errors import BundleError, CompexportError, DependencyError, InputError
from engines import backends
from engines.backends import cuda, ort, ort_build, ort_provider
from engines.bundle import Bundle

RATIOS = (1, 2, 4)
NAMES = [f"variator-r{ratio}-fp32" for ratio in RATIOS]
Arrays = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of tiny-bert as a classifier. Do not write into it."""
    from exporter import family

    made = tmp_path_factory.mktemp("ort") / "bundle"
    family.build(tiny("tiny-bert", "sequence-classification"), RATIOS, made, untrained=True)
    return made


@pytest.fixture
def bundle(folder: Path) -> Bundle:
    return Bundle.open(folder)


def feed(batch: int, length: int, seed: int = 0) -> Arrays:
    generator = np.random.default_rng(seed)
    mask = (np.arange(length) < generator.integers(1, length + 1, batch)[:, None]).astype(np.int64)
    ids = generator.integers(5, 100, (batch, length)) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def external(path: Path) -> dict[str, dict[str, str]]:
    """Tensor name -> its external-data entries."""
    model = onnx.load(path, load_external_data=False)
    return {t.name: {e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data}


# --- building -----------------------------------------------------------------------------------------------------


def test_engines_share_one_weights_file_with_every_blob_once(folder: Path) -> None:
    engines = folder / "engines" / "ort-cpu"
    assert sorted(path.name for path in engines.iterdir()) == ["r1.onnx", "r2.onnx", "r4.onnx", "weights.bin"]
    data = (engines / "weights.bin").read_bytes()
    places: set[tuple[int, int]] = set()
    mentions = 0
    for ratio in RATIOS:
        for entries in external(engines / f"r{ratio}.onnx").values():
            assert entries["location"] == "weights.bin"
            found = [(int(entries["offset"]), int(entries["length"]))]
            for key, value in entries.items():
                if key.startswith("prepacked_"):
                    found += [tuple(map(int, blob.split(";")[:2])) for blob in value.split("|")[1:]]  # type: ignore[misc]
            places.update(found)
            mentions += len(found)
    blobs = [data[offset : offset + length] for offset, length in sorted(places)]
    assert all(offset % 4096 == 0 and offset + length <= len(data) for offset, length in places)
    assert len(set(blobs)) == len(blobs), "a blob is stored twice"
    assert mentions > 2 * len(places), "the ratios share next to nothing"
    # ... and nothing else is in the file.
    assert len(data) <= sum(-(-len(blob) // 4096) * 4096 for blob in blobs)


def test_a_full_disk_is_told_as_such(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not as what goes wrong while the error is on its way."""

    def full(self: Any, data: memoryview) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    graphs = Bundle.open(folder).manifest.graphs
    shutil.copytree(folder / "graphs", tmp_path / "graphs")
    monkeypatch.setattr(ort_build._PackedWeights, "_place", full)
    with ort.EngineBuilder(tmp_path, "engines") as builder, pytest.raises(OSError, match="No space left"):
        builder.add(NAMES[0], next(iter(graphs.values())))
        builder.finish()


def test_weights_are_packed_for_the_processor(folder: Path) -> None:
    for ratio in RATIOS:
        tensors = external(folder / "engines" / "ort-cpu" / f"r{ratio}.onnx")
        packed = [name for name, entries in tensors.items() if any(key.startswith("prepacked_") for key in entries)]
        # Two layers of six matrices each; the embeddings and the like are not multiplied.
        assert len(packed) >= 12, ratio


def test_backbone_tensors_of_every_ratio_lie_in_the_same_place(folder: Path) -> None:
    one, *others = ({e["offset"] for e in external(folder / f"engines/ort-cpu/r{r}.onnx").values()} for r in RATIOS)
    assert all(one <= other for other in others)


def test_manifest_entries(bundle: Bundle) -> None:
    for name, engine in bundle.manifest.engines.items():
        assert name == f"{engine.graph}-ort-cpu"
        assert engine.backend_version == onnxruntime.__version__
        assert engine.files == [engine.path, "engines/ort-cpu/weights.bin"]
        assert engine.key == ort.engine_key(bundle.manifest.graphs[engine.graph].key)


# --- running ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_sessions_agree_with_plain_onnxruntime(bundle: Bundle, threads: int | None) -> None:
    sessions = ort.open_sessions(bundle, threads=threads)
    assert list(sessions) == NAMES
    for ratio, session in zip(RATIOS, sessions.values(), strict=True):
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.intra_op_num_threads = 1
        graph = bundle.path / "graphs" / f"r{ratio}.onnx"
        plain = onnxruntime.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])
        for batch, length in ((1, 1), (1, 5), (3, 17), (2, 128)):
            feeds = feed(batch, length)
            (expected,) = plain.run(["logits"], feeds)
            found = session.run(feeds)
            assert list(found) == ["logits"] and found["logits"].shape == (batch, 2)
            np.testing.assert_allclose(found["logits"], expected, atol=1e-5)


def test_threads_option(bundle: Bundle) -> None:
    for threads in (1, 2):
        session = ort.open_file(bundle.path / "engines/ort-cpu/r1.onnx", threads=threads)
        assert session.get_session_options().intra_op_num_threads == threads
    default = ort.open_file(bundle.path / "engines/ort-cpu/r1.onnx")
    assert default.get_session_options().intra_op_num_threads == ort.usable_cores()


def test_only_the_variants_asked_for(bundle: Bundle) -> None:
    assert list(ort.open_sessions(bundle, [NAMES[2], NAMES[0]], threads=1)) == [NAMES[2], NAMES[0]]


def test_no_outputs_asked_for(bundle: Bundle) -> None:
    session = ort.open_sessions(bundle, NAMES[:1], threads=1)[NAMES[0]]
    assert session.run(feed(1, 4), []) == {}


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell a process its memory")
def test_sessions_compute_in_the_same_memory(tmp_path: Path) -> None:
    text = """<ir_version: 10, opset_import: ["": 18]>
    big (int64[1] size) => (float sum) {
        one = Constant <value_floats = [1.0]> ()
        ones = Expand (one, size)
        grown = Exp (ones)
        sum = ReduceSum <keepdims = 0> (grown)
    }"""
    path = tmp_path / "big.onnx"
    onnx.save(onnx.parser.parse_model(text), str(path))
    size, number = 2**24, 4  # 64 MB for each of two tensors
    sessions = [ort.open_file(path, threads=1) for _ in range(number)]
    held = []
    for session in sessions:
        session.run(None, {"size": np.array([size], np.int64)})
        held.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    assert held[-1] - held[0] < size * 4


def test_one_session_in_many_threads(bundle: Bundle) -> None:
    sessions = ort.open_sessions(bundle, threads=1)
    feeds = [feed(2, 3 + 5 * i, seed=i) for i in range(4)]
    expected = {name: [session.run(f)["logits"] for f in feeds] for name, session in sessions.items()}
    wrong: list[str] = []
    start = threading.Barrier(6)

    def work(which: int) -> None:
        start.wait()
        for turn in range(40):
            name, index = NAMES[(which + turn) % 3], (which * turn) % 4
            try:
                if not np.array_equal(sessions[name].run(feeds[index])["logits"], expected[name][index]):
                    wrong.append(f"{name} {index}")
            except Exception as error:
                wrong.append(repr(error))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []


def test_feeds_are_checked(bundle: Bundle) -> None:
    session = ort.open_sessions(bundle, [NAMES[1]], threads=1)[NAMES[1]]
    with pytest.raises(InputError, match="^variator-r2-fp32: input input_ids: got int32"):
        session.run({**feed(1, 4), "input_ids": np.ones((1, 4), np.int32)})


# --- refusals -----------------------------------------------------------------------------------------------------


def test_engine_of_another_version(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "version", lambda: "9.9.9")
    with pytest.raises(BundleError) as caught:
        ort.open_sessions(bundle)
    message = str(caught.value)
    assert f"got ONNX Runtime {onnxruntime.__version__} on {ort.instruction_set()}, expected 9.9.9 on" in message
    assert message.endswith("build it on this machine with `compexport build`")


def test_engine_of_another_processor(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "instruction_set", lambda: "cpu-riscv64-baseline")
    with pytest.raises(BundleError, match="on cpu-riscv64-baseline; build it on this machine with `compexport build`"):
        ort.open_sessions(bundle)


def test_no_engine_at_all(bundle: Bundle) -> None:
    bundle.manifest = bundle.manifest.model_copy(update={"engines": {}})
    with pytest.raises(BundleError, match="no ort engine of r1; build it on this machine with `compexport build`"):
        ort.open_sessions(bundle)


@pytest.mark.parametrize("file", ["engines/ort-cpu/weights.bin", "engines/ort-cpu/r2.onnx"])
def test_flipped_byte(folder: Path, tmp_path: Path, file: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "bundle"))
    data = bytearray((copy / file).read_bytes())
    data[len(data) // 2] ^= 1
    (copy / file).write_bytes(data)
    with pytest.raises(BundleError, match=file):
        ort.open_sessions(Bundle.open(copy))


def test_file_that_onnxruntime_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "r2.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match="r2.onnx: ONNX Runtime cannot open it: got ") as caught:
        ort.open_file(tmp_path / "r2.onnx")
    assert "\n" not in str(caught.value)


def _installed(monkeypatch: pytest.MonkeyPatch, *distributions: str) -> None:
    """Pretend that of ONNX Runtime's packages exactly these are installed."""
    real = metadata.version

    def version(name: str) -> str:
        if not name.startswith("onnxruntime"):
            return real(name)
        if name in distributions:
            return "1.31.0"
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)


def test_neither_package(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch)
    message = r"onnxruntime is missing; pip install 'compexport\[cpu\]' or 'compexport\[gpu\]'"
    for attempt in (ort.require, lambda: ort.open_sessions(bundle), lambda: backends.load("ort")):
        with pytest.raises(DependencyError, match=message):
            attempt()
    assert "missing" in backends.available()["ort"]


def test_both_packages(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    _installed(monkeypatch, "onnxruntime", "onnxruntime-gpu")
    with pytest.raises(DependencyError, match="onnxruntime and onnxruntime-gpu are both installed .* pip uninstall"):
        ort.open_sessions(bundle)
    assert "both" in backends.available()["ort"]


@pytest.mark.parametrize("distribution", ["onnxruntime", "onnxruntime-gpu"])
def test_one_package(monkeypatch: pytest.MonkeyPatch, distribution: str) -> None:
    _installed(monkeypatch, distribution)
    assert ort.unavailable() == "" and ort.version() == "1.31.0"


def test_unknown_backend_and_provider(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="unknown backend: got 'tensorrt', expected one of ort, trt, trt-rtx"):
        backends.load("tensorrt")
    with pytest.raises(InputError, match="unknown provider: got 'tpu', expected one of cpu, cuda, cuda-graphs"):
        ort.open_sessions(bundle, provider="tpu")


def test_unknown_variant(bundle: Bundle) -> None:
    with pytest.raises(InputError, match="variator-r3-fp32"):
        ort.open_sessions(bundle, ["variator-r3-fp32"])


@pytest.mark.filterwarnings("ignore:Specified provider 'CUDAExecutionProvider'")
@pytest.mark.skipif("CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="CUDA is here")
def test_cuda_where_there_is_none(bundle: Bundle) -> None:
    """One clear error that says what to install, never a session on the processor."""
    with pytest.raises(DependencyError, match=r"CUDAExecutionProvider.*compexport\[gpu\]") as caught:
        ort.open_sessions(bundle, provider="cuda")
    assert "\n" not in str(caught.value)


def test_device_name_tells_threads_and_provider() -> None:
    one, two = (ort.device_name({"threads": threads}) for threads in (1, 2))
    assert one.startswith("cpu-") and one.endswith("-1t") and two == one[:-2] + "2t"
    assert ort.device_name({}) == ort.device_name({"threads": ort.usable_cores()})


def test_the_profile_on_cuda_names_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    monkeypatch.setattr(cuda, "devices", lambda: [cuda.Device(0, "NVIDIA GeForce RTX 4090", "sm89")])
    names = [ort.device_name({"provider": provider}) for provider in ("cuda", "cuda-graphs")]
    assert names == ["cuda-nvidia-geforce-rtx-4090", "cuda-graphs-nvidia-geforce-rtx-4090"]
    monkeypatch.setattr(cuda, "devices", list)
    with pytest.raises(DependencyError, match="^--provider cuda-graphs needs a CUDA device: got none; run it on"):
        ort.device_name({"provider": "cuda-graphs"})


@pytest.mark.parametrize(("op", "allowed"), [("Concat", True), ("Add", True), ("MatMul", False), ("Tanh", False)])
def test_nodes_on_the_processor_are_allowed_for_shapes_only(op: str, allowed: bool) -> None:
    """Of a session on the processor, all are there."""
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2, 2])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    attributes = {"axis": 0} if op == "Concat" else {}
    node = onnx.helper.make_node(op, ["x"] if op == "Tanh" else ["x", "x"], ["y"], **attributes)
    graph = onnx.helper.make_graph([node], op, [x], [y])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    if allowed:
        ort_provider.require_on_device("tiny", session)
        return
    with pytest.raises(CompexportError, match=f"^tiny: .* on the processor: got {op}, expected arithmetic of"):
        ort_provider.require_on_device("tiny", session)
