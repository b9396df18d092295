"""Plans of all graphs of a bundle that is being written: one process each, one after the other, in the background."""

from __future__ import annotations

import hashlib
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Protocol

from compexport.errors import BundleError, CompexportError, describe
from engines.backends import cuda
from engines.backends.trt_build import Built, Request
from engines.backends.trt_options import PlanOptions
from engines.backends.trt_plan import PlanOrder, PlanRecord
from engines.backends.trt_process import PlanProcess
from engines.backends.trt_product import Product, this_platform
from engines.backends.trt_profiles import profiles_of, resolved
from engines.bundle_reader import Bundle, sha256_of
from engines.manifest import Engine, Graph
from engines.plugins import ptx

TIMINGS = "timing.cache"
_FOLLOW_S = 0.2
_SOURCES = ("trt_build.py", "trt_maker.py", "trt_profiles.py")


class Progress(Protocol):
    """A line for the stage, and how far a single build is where that is known."""

    def __call__(self, message: str, done: float | None = None, total: float | None = None) -> None: ...


def _silent(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""


class PlanMaker:
    """Builds plans of one product with one set of options, as ``engines.backends`` describes builders."""

    # A plan is compared with PyTorch where it can be executed, which needs a GPU.
    RUNS_HERE = False
    NOTE = ""

    def __init__(self, product: Product, options: PlanOptions) -> None:
        self.product, self.options = product, options
        self.NAME = product.name
        self.targets = self._targets()
        self.FOLDER = f"engines/{self.NAME}-{'-'.join(self.targets)}"

    def version(self) -> str:
        """The library's version."""
        return self.product.version()

    def engine_key(self, graph_key: str) -> str:
        """Hash of what the plan of a graph depends on."""
        facts = (
            graph_key,
            self.NAME,
            self.version(),
            this_platform(),
            *self.targets,
            str(self.options),
            sources_sha256(*_SOURCES),
        )
        if self.options.plugins:
            facts += (ptx.compiler(),)
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()

    def EngineBuilder(
        self, root: Path, folder: str, longest: int | None = None, previous: Bundle | None = None
    ) -> PlanBuilder:
        """A builder of the bundle staged at ``root``; ``longest``: tokens that its graphs take.

        What was timed for ``previous``, which the bundle is to replace, is not timed again.
        """
        return PlanBuilder(self, root, folder, longest, previous)

    @property
    def kernels(self) -> int | None:
        """The compute capability that plugins' kernels are compiled for; None without plugins."""
        if not self.options.plugins:
            return None
        return ptx.PORTABLE if self.options.hardware_compatible else ptx.capability_for(self.targets[0])

    def _targets(self) -> list[str]:
        if self.product.targets:
            return list(self.options.targets or self.product.targets)
        return [cuda.require_device(f"a build of {self.product.title}").capability]


class PlanBuilder:
    """Builds the plans of a staged bundle one after the other, in the background, as graphs are added.

    A context manager; leaving it early cancels what is under way.
    """

    def __init__(self, maker: PlanMaker, root: Path, folder: str, longest: int | None, previous: Bundle | None) -> None:
        self._maker, self._root, self._folder, self._previous = maker, root, folder, previous
        self._options = with_ranges(maker.options, longest)
        self._added: dict[str, tuple[Graph, PlanProcess, Future[Built]]] = {}
        self._worker = ThreadPoolExecutor(1)

    def add(self, name: str, graph: Graph) -> None:
        """Begin with a graph that is written and will not change; InputError for an axis without a range."""
        maker, options = self._maker, self._options
        folder = self._root / self._folder
        folder.mkdir(parents=True, exist_ok=True)
        if not self._added:
            self._take_timings(folder / TIMINGS)
        request = Request(
            module=maker.product.module,
            graph=str(self._root / graph.path),
            plan=str(folder / f"{name}.plan"),
            profiles=order_of(maker.product, name, graph, options).profiles,
            targets=maker.targets if maker.product.targets else [],
            workspace_mib=options.workspace_mib,
            level=options.level,
            strip=options.strip,
            version_compatible=options.version_compatible,
            without_lean=maker.product.without_lean,
            hardware_compatible=options.hardware_compatible,
            detailed=options.detailed,
            plugins=maker.kernels,
            timing_cache=str(folder / TIMINGS) if maker.product.keeps_timings else None,
        )
        process = PlanProcess(request, f"{maker.product.title} {maker.version()}")
        self._added[name] = (graph, process, self._worker.submit(process.run))

    def finish(self, progress: Progress = _silent) -> dict[str, Engine]:
        """Wait for all; engines by graph name. CompexportError names the graph that failed, and why."""
        title = f"{self._maker.product.title} {self._maker.version()}"
        engines = {}
        for name, (graph, process, done) in self._added.items():
            while wait_for([done], timeout=_FOLLOW_S).not_done:
                progress(f"building {name} with {title}", process.share, 1.0)
            engines[name] = self._engine(name, graph, done.result())
        return engines

    def __enter__(self) -> PlanBuilder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)
        for _, process, done in self._added.values():
            if not done.done():
                process.cancel()
        self._worker.shutdown()

    def _take_timings(self, cache: Path) -> None:
        """The timing cache of the previous bundle, as a file of its own, for it is written to."""
        rel = f"{self._folder}/{TIMINGS}"
        if not self._maker.product.keeps_timings or self._previous is None or rel not in self._previous.manifest.files:
            return
        with suppress(BundleError):  # a damaged one is none
            shutil.copyfile(self._previous.file(rel), cache)

    def _engine(self, name: str, graph: Graph, built: Built) -> Engine:
        """Check what was built against the graph, write its record, and list it."""
        maker = self._maker
        _require_tensors(name, graph, built)
        plan, record_path = f"{self._folder}/{name}.plan", f"{self._folder}/{name}.json"
        record = PlanRecord(
            **order_of(maker.product, name, graph, self._options).model_dump(),
            version=built.version,
            platform=this_platform(),
            targets=maker.targets,
            plugins=built.plugins,
            size_bytes=(self._root / plan).stat().st_size,
            sha256=sha256_of(self._root / plan),
            build_seconds=round(built.seconds, 3),
        )
        (self._root / record_path).write_text(record.model_dump_json(indent=1) + "\n", encoding="utf-8")
        timings = f"{self._folder}/{TIMINGS}"
        return Engine(
            graph=name,
            backend=maker.NAME,
            backend_version=built.version,
            device=",".join(maker.targets),
            path=plan,
            files=[plan, record_path, *([timings] if (self._root / timings).is_file() else [])],
            key=maker.engine_key(graph.key),
        )


def order_of(product: Product, name: str, graph: Graph, options: PlanOptions) -> PlanOrder:
    """What is to be built of a graph; ``options`` with ranges resolved."""
    assert options.batch is not None and options.length is not None
    return PlanOrder(
        product=product.name,
        graph=name,
        graph_key=graph.key,
        profiles=profiles_of(graph.inputs, options.batch, options.length),
        inputs=graph.inputs,
        outputs=graph.outputs,
        options=options.document(),
    )


def with_ranges(options: PlanOptions, longest: int | None) -> PlanOptions:
    """The options with the ranges that are meant where none are given."""
    batch, length = resolved(options.batch, options.length, longest)
    return replace(options, batch=batch, length=length)


def _require_tensors(name: str, graph: Graph, built: Built) -> None:
    """CompexportError when the library understands other inputs or outputs than ONNX Runtime did."""
    for kind, specs, tensors in (("input", graph.inputs, built.inputs), ("output", graph.outputs, built.outputs)):
        expected = {spec.name: (spec.dtype, [n if isinstance(n, int) else None for n in spec.shape]) for spec in specs}
        got = {tensor: (dtype, shape) for tensor, dtype, shape in tensors}
        for tensor, wanted in expected.items():
            if not _same(got.get(tensor), wanted):
                what = f"{name}: {kind} {tensor} of the plan"
                raise CompexportError(describe(what, got=got.get(tensor), expected=wanted))


def _same(got: tuple[str, list[int | None]] | None, wanted: tuple[str, list[int | None]]) -> bool:
    """Equal types and ranks; a size may be known to one of the two only."""
    if got is None or got[0] != wanted[0] or len(got[1]) != len(wanted[1]):
        return False
    return all(a is None or b is None or a == b for a, b in zip(got[1], wanted[1], strict=True))


def sources_sha256(*names: str) -> str:
    """Hash of files beside this one, which what is made depends on."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in names)).hexdigest()
