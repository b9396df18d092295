"""Engines for ONNX Runtime's CPU provider: each graph optimised, all their tensors in one file.

An engine's bytes follow from its graph, the library's version, the processor and this file alone (``engine_key``).
"""

from __future__ import annotations

import hashlib
import mmap
import platform
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from compexport.errors import CompexportError, describe
from engines.atomic import is_no_space
from engines.backends.ort_library import first_line, session_options, version
from engines.bundle import Bundle
from engines.manifest import Engine, Graph

NAME = "ort"
FOLDER = "engines/ort-cpu"
WEIGHTS = "weights.bin"
PAGE = 4096
EXTERNAL_BYTES = 1024

Progress = Callable[[str], None]


def instruction_set() -> str:
    """What pre-packed weights are laid out for; an engine of another one must not be opened."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    best = next((name for name in ("amx_tile", "avx512f", "avx2", "avx") if name in words), "baseline")
    return f"cpu-{platform.machine()}-{best}"


class EngineBuilder:
    """Builds engines of the bundle staged at ``root`` into ``root/folder``, in the background, as graphs are added.

    Writes ``folder/<graph>.onnx`` and ``folder/weights.bin``. Outputs are not checked here: the caller compares them.
    A context manager; leaving it early waits for what is under way and drops the rest.
    """

    def __init__(self, root: Path, folder: str, longest: int | None = None, previous: Bundle | None = None) -> None:
        """``longest``: tokens that the graphs take; an engine for any number of them has no use for it."""
        self._root, self._folder = root, folder
        self._added: dict[str, tuple[Graph, Future[None]]] = {}
        # ONNX Runtime packs with one thread and then writes: processor and disk have room for a neighbour.
        self._worker = ThreadPoolExecutor(1)

    def add(self, name: str, graph: Graph) -> None:
        """Begin with a graph that is written and will not change."""
        target = self._root / self._folder / f"{name}.onnx"
        self._added[name] = (graph, self._worker.submit(_optimise, self._root / graph.path, target, self._weights))

    @cached_property
    def _weights(self) -> _PackedWeights:
        """Made with the first graph: without one, the folder may hold engines of an earlier build."""
        (self._root / self._folder).mkdir(parents=True, exist_ok=True)
        return _PackedWeights(self._root / self._folder / WEIGHTS)

    def finish(self, progress: Progress = lambda message: None) -> dict[str, Engine]:
        """Wait for all; engines by graph name. CompexportError names the graph that failed, OSError a full disk."""
        for name, (graph, done) in self._added.items():
            progress(f"optimising {name} for ONNX Runtime {version()}")
            try:
                done.result()
            except Exception as error:
                if is_no_space(error):
                    raise
                what = f"{Path(graph.path).name}: ONNX Runtime cannot build it"
                raise CompexportError(describe(what, got=first_line(error))) from error
        if self._added:
            self._weights.close()
        return {name: _engine(name, graph, self._folder) for name, (graph, _) in self._added.items()}

    def __enter__(self) -> EngineBuilder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.shutdown(cancel_futures=True)
        if self._added:
            self._weights.close()


def engine_key(graph_key: str) -> str:
    """Hash of what the engine of a graph depends on."""
    facts = "\0".join((graph_key, version(), instruction_set(), _source_sha256()))
    return hashlib.sha256(facts.encode()).hexdigest()


def _engine(name: str, graph: Graph, folder: str) -> Engine:
    path = f"{folder}/{name}.onnx"
    return Engine(
        graph=name,
        backend=NAME,
        backend_version=version(),
        device=instruction_set(),
        path=path,
        files=[path, f"{folder}/{WEIGHTS}"],
        key=engine_key(graph.key),
    )


def _source_sha256() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


def _optimise(source: Path, target: Path, weights: _PackedWeights) -> None:
    """Let ONNX Runtime write its optimised graph to ``target``, then move its tensors into the family's one file."""
    import onnxruntime

    own_weights = target.with_suffix(".tmp.bin")
    options = session_options(threads=None)
    options.optimized_model_filepath = str(target)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": own_weights.name,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(EXTERNAL_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    weights.adopt(target, own_weights)


class _PackedWeights:
    """The family's weights file: tensors and pre-packed copies of several optimised models, each stored once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream = path.open("wb")
        self._places: dict[bytes, int] = {}

    def adopt(self, model_path: Path, source: Path) -> None:
        """Move what the model at ``model_path`` refers to in ``source`` into this file and rewrite its references."""
        import onnx

        model = onnx.load(str(model_path), load_external_data=False)
        if source.exists():
            with _mapped(source) as view:
                self._adopt_tensors(model, view)
            source.unlink()
        model_path.write_bytes(model.SerializeToString())

    def _adopt_tensors(self, model: Any, view: memoryview) -> None:
        for tensor in model.graph.initializer:
            entries = {entry.key: entry for entry in tensor.external_data}
            if "location" not in entries:
                continue
            offset, length = int(entries["offset"].value), int(entries["length"].value)
            entries["location"].value = self._path.name
            with view[offset : offset + length] as data:
                entries["offset"].value = str(self._place(data))
            for key, entry in entries.items():
                if key.startswith("prepacked_"):
                    entry.value = self._place_packed(entry.value, view)

    def _place_packed(self, value: str, view: memoryview) -> str:
        """``"<kernel>+<hash>|offset;length;checksum|…"`` with each blob moved here."""
        kernel, *blobs = value.split("|")
        moved = []
        for blob in blobs:
            offset, length, *rest = blob.split(";")
            with view[int(offset) : int(offset) + int(length)] as data:
                place = self._place(data)
            moved.append(";".join((str(place), length, *rest)))
        return "|".join((kernel, *moved))

    def _place(self, data: memoryview) -> int:
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            self._stream.write(bytes(-self._stream.tell() % PAGE))
            self._places[digest] = self._stream.tell()
            self._stream.write(data)
        return self._places[digest]

    def close(self) -> None:
        self._stream.close()


@contextmanager
def _mapped(path: Path) -> Iterator[memoryview]:
    with (
        path.open("rb") as stream,
        mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        memoryview(data) as view,
    ):
        yield view
