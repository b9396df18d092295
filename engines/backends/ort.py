"""ONNX Runtime: optimise each graph once, pack its weights once for the whole family, map them into every session.

An engine folder holds ``<graph>.onnx`` (optimised, hardware-specific) and one ``weights.bin`` with every distinct
tensor, both as stored and as the processor's matrix kernels want it ("pre-packed"). Sessions memory-map that file, so
any number of ratios and processes share one copy of the weights.
"""

from __future__ import annotations

import hashlib
import mmap
import platform
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import BundleError, CompexportError, DependencyError, InputError, describe
from engines.backends.family import known_variants, opened_graphs, opened_variants
from engines.backends.trt_options import PlanOptions
from engines.bundle import Bundle
from engines.manifest import Engine, Graph, TensorSpec
from engines.measure import processor, usable_cores
from engines.session import Array, Session

NAME = "ort"
FOLDER = "engines/ort-cpu"
RUNS_HERE = True  # what is built can be compared with PyTorch at once
NOTE = ""
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
WEIGHTS = "weights.bin"
PAGE = 4096
EXTERNAL_BYTES = 1024

Progress = Callable[[str], None]


# --- what is installed, what machine this is -----------------------------------------------------------------------


def unavailable() -> str:
    """Why ONNX Runtime cannot be used, or an empty text."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version_of(name)]
    if not installed:
        return describe("onnxruntime is missing", hint="pip install 'compexport[cpu]' or 'compexport[gpu]'")
    if len(installed) == 2:
        return describe(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
            hint="pip uninstall both, then install one of them",
        )
    return ""


def require() -> None:
    """DependencyError when ONNX Runtime cannot be used."""
    reason = unavailable()
    if reason:
        raise DependencyError(reason)


def version() -> str:
    """The installed ONNX Runtime's version."""
    return _version_of("onnxruntime") or _version_of("onnxruntime-gpu")


def _version_of(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def device_name(options: Mapping[str, Any]) -> str:
    """Key of this machine's latency profile: processor and threads, or the CUDA provider."""
    if options.get("provider", "cpu") == "cuda":
        return "cuda"
    model = re.sub(r"[^a-z0-9]+", "-", processor().lower()).strip("-")
    return f"cpu-{model}-{options.get('threads') or usable_cores()}t"


def instruction_set() -> str:
    """What pre-packed weights are laid out for; an engine of another one must not be opened."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        words = set()
    best = next((name for name in ("amx_tile", "avx512f", "avx2", "avx") if name in words), "baseline")
    return f"cpu-{platform.machine()}-{best}"


# --- building ------------------------------------------------------------------------------------------------------


def builder(options: PlanOptions | None = None) -> ModuleType:
    """This module; InputError for options, which are TensorRT's."""
    if options is not None and options.given():
        raise InputError(describe(f"--{options.given()[0]}", got="the backend ort", expected="trt or trt-rtx"))
    require()
    return sys.modules[__name__]


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
        """Wait for all; engines by graph name. CompexportError names the graph that failed."""
        for name, (graph, done) in self._added.items():
            progress(f"optimising {name} for ONNX Runtime {version()}")
            try:
                done.result()
            except Exception as error:
                what = f"{Path(graph.path).name}: ONNX Runtime cannot build it"
                raise CompexportError(describe(what, got=_first_line(error))) from error
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
    options = _options(threads=None)
    options.optimized_model_filepath = str(target)
    for key, value in {
        "session.optimized_model_external_initializers_file_name": own_weights.name,
        "session.optimized_model_external_initializers_min_size_in_bytes": str(EXTERNAL_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }.items():
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(str(source), options, providers=[PROVIDERS["cpu"]])
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
            entries["offset"].value = str(self._place(view[offset : offset + length]))
            for key, entry in entries.items():
                if key.startswith("prepacked_"):
                    entry.value = self._place_packed(entry.value, view)

    def _place_packed(self, value: str, view: memoryview) -> str:
        """``"<kernel>+<hash>|offset;length;checksum|…"`` with each blob moved here."""
        kernel, *blobs = value.split("|")
        moved = []
        for blob in blobs:
            offset, length, *rest = blob.split(";")
            place = self._place(view[int(offset) : int(offset) + int(length)])
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


# --- running -------------------------------------------------------------------------------------------------------


class OrtSession(Session):
    """An ONNX Runtime session; ``memory`` is where it computes, "cpu" or "cuda"."""

    def __init__(self, name: str, graph: Graph, inner: Any, memory: str = "cpu") -> None:
        super().__init__(name, graph.inputs, graph.outputs)
        self._inner = inner
        self._memory = memory

    def _run(self, feeds: Mapping[str, Array], names: Sequence[str]) -> Sequence[Array]:
        outputs: Sequence[Array] = self._open().run(names, feeds)
        return outputs

    def run_held(
        self, feeds: Mapping[str, Array], held: Mapping[str, Any], outputs: Sequence[str], hold: Sequence[str]
    ) -> tuple[dict[str, Array], dict[str, Any]]:
        """As ``engines.session.HoldingSession``; what is held are OrtValues."""
        inner = self._open()
        if self._memory == "cpu":
            return _run_here(inner, feeds, held, outputs, hold)
        binding = inner.io_binding()
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name, value in held.items():
            binding.bind_ortvalue_input(name, value)
        for name in outputs:
            binding.bind_output(name)
        for name in hold:
            binding.bind_output(name, self._memory)
        inner.run_with_iobinding(binding)
        values = binding.get_outputs()
        here = {name: value.numpy() for name, value in zip(outputs, values, strict=False)}
        return here, dict(zip(hold, values[len(outputs) :], strict=True))

    def take_rows(self, held: Any, rows: npt.NDArray[np.int64]) -> Any:
        """As ``engines.session.GatheringSession``."""
        import onnxruntime

        return onnxruntime.OrtValue.ortvalue_from_numpy(held.numpy()[rows], self._memory, 0)

    def close(self) -> None:
        """A run that is in the engine ends as it would; the next one, a cascade's next segment too, is refused."""
        self._inner = None

    def _open(self) -> Any:
        inner = self._inner
        if inner is None:
            raise CompexportError(describe(f"{self.name}: the engine is closed", hint="load the bundle again"))
        return inner


def _run_here(
    inner: Any, feeds: Mapping[str, Array], held: Mapping[str, Any], outputs: Sequence[str], hold: Sequence[str]
) -> tuple[dict[str, Array], dict[str, Any]]:
    """``run_held`` in this process's memory: one call, where a binding takes one for every tensor, at each step."""
    import onnxruntime

    values = {name: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(one)) for name, one in feeds.items()}
    found = inner.run_with_ort_values([*outputs, *hold], {**values, **held})
    here = {name: value.numpy() for name, value in zip(outputs, found, strict=False)}
    return here, dict(zip(hold, found[len(outputs) :], strict=True))


def shortest_text(bundle: Bundle) -> int:
    """As ``engines.session.Backend``: graphs take any length."""
    return 1


def open_sessions(
    bundle: Bundle, variants: Sequence[str] | None = None, *, threads: int | None = None, provider: str = "cpu"
) -> dict[str, Session]:
    """Sessions of the named variants (all by default); of one with exits, a ``Cascade`` of its segments.

    Those of a step engine are opened once for all of its variants, so closing one of these closes all.

    Arguments and errors as ``open_graphs``.
    """
    require_provider(provider)
    names = known_variants(bundle, variants)
    return opened_variants(bundle, names, lambda graph, name: _open_graph(bundle, graph, name, threads, provider))


def open_graphs(
    bundle: Bundle, graphs: Sequence[str], *, threads: int | None = None, provider: str = "cpu"
) -> dict[str, OrtSession]:
    """Sessions of the named graphs.

    They share one mapping of the weights. Each has ``threads`` threads (by default as many as the cores this process
    may use), which rest between runs.
    ``provider`` "cuda" runs the portable graphs on the CUDA provider and refuses to fall back to the processor.
    Raises BundleError for an engine of another ONNX Runtime version or processor, or one that cannot be opened.
    """
    require_provider(provider)
    return opened_graphs(graphs, lambda graph, name: _open_graph(bundle, graph, name, threads, provider))


def require_provider(provider: str) -> None:
    """InputError for an unknown provider, DependencyError when ONNX Runtime lacks it or cannot be used."""
    require()
    import onnxruntime

    if provider not in PROVIDERS:
        raise InputError(describe("unknown provider", got=repr(provider), expected=f"one of {', '.join(PROVIDERS)}"))
    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        hint = "install compexport[gpu] instead of compexport[cpu]"
        raise DependencyError(describe(f"this ONNX Runtime has no {PROVIDERS[provider]}", hint=hint))


def _open_graph(bundle: Bundle, graph: str, name: str, threads: int | None, provider: str) -> OrtSession:
    """The session of a graph, which calls itself ``name`` in messages."""
    facts = bundle.manifest.graphs[graph]
    path = _graph_file(bundle, facts) if provider == "cuda" else _engine_file(bundle, graph)
    return OrtSession(name, facts, open_file(path, threads=threads, provider=provider), provider)


def open_file(path: Path, *, threads: int | None = None, provider: str = "cpu", optimised: bool = True) -> Any:
    """A bare ``onnxruntime.InferenceSession`` over a file; ``optimised``: the file is an engine, not a graph."""
    import onnxruntime

    options = _options(threads)
    if optimised and provider == "cpu":
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if provider == "cuda":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    else:
        _make_shared_arena()
        options.add_session_config_entry("session.use_env_allocators", "1")
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=[PROVIDERS[provider]])
    except Exception as error:
        raise BundleError(describe(f"{path}: ONNX Runtime cannot open it", got=_first_line(error))) from error
    if PROVIDERS[provider] not in session.get_providers():
        raise DependencyError(
            describe(
                f"{path.name}: no {PROVIDERS[provider]}", got=session.get_providers(), hint="install compexport[gpu]"
            )
        )
    return session


@cache
def _make_shared_arena() -> None:
    """One arena, for as long as the process lives, in which all our sessions compute.

    Otherwise each would keep one of its own, as large as its largest run needed. Other users of ONNX Runtime in the
    process are left alone, unless they ask for a shared arena too.
    """
    import onnxruntime

    arena = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = onnxruntime.OrtMemoryInfo("Cpu", arena, 0, onnxruntime.OrtMemType.DEFAULT)
    onnxruntime.create_and_register_allocator(place, onnxruntime.OrtArenaCfg({}))


def tensor_specs(values: Sequence[Any]) -> list[TensorSpec]:
    """Inputs or outputs of a bare session as manifest entries."""
    dtypes = {"tensor(int64)": "int64", "tensor(float)": "float32"}
    return [TensorSpec(name=v.name, dtype=dtypes[v.type], shape=list(v.shape)) for v in values]


def _options(threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads or usable_cores()
    # Without this, a session's threads spin on after a run and take cores from the family's next member. A pool shared
    # by all sessions would do as well, but then no other user of ONNX Runtime in the process could have its own.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return options


def _graph_file(bundle: Bundle, graph: Graph) -> Path:
    weights = f"{graph.path.rsplit('/', 1)[0]}/{WEIGHTS}"
    if weights in bundle.manifest.files:
        bundle.file(weights)
    return bundle.file(graph.path)


def _engine_file(bundle: Bundle, graph: str) -> Path:
    engines = [e for e in bundle.manifest.engines.values() if e.graph == graph and e.backend == NAME]
    if not engines:
        raise BundleError(describe(f"{bundle.path}: no {NAME} engine of {graph}", hint=_REBUILD))
    wanted = (version(), instruction_set())
    for engine in engines:
        if (engine.backend_version, engine.device) == wanted:
            for file in engine.files:
                bundle.file(file)
            return bundle.file(engine.path)
    engine = engines[0]
    got = f"ONNX Runtime {engine.backend_version} on {engine.device}"
    expected = f"{wanted[0]} on {wanted[1]}"
    raise BundleError(describe(f"{bundle.path}: the engine of {graph}", got=got, expected=expected, hint=_REBUILD))


_REBUILD = "build it on this machine with `compexport build`"


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
