"""TensorRT and TensorRT-RTX: one plan per graph, compiled ahead, executed on an NVIDIA GPU.

The two products have nearly the same Python interface, so all code takes their module as an argument, and what differs
is said once (``trt_product``). An engine folder holds ``<graph>.plan`` and ``<graph>.json``, the plan's record
(``trt_plan``), which is checked before the plan is read, and with TensorRT one timing cache for all graphs.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from compexport.errors import BundleError, CompexportError, DependencyError, InputError, describe
from engines.backends import build_command, cuda
from engines.backends.cuda_lanes import Lanes
from engines.backends.cuda_memory import CudaMemory
from engines.backends.family import known_variants, needed_graphs, opened_graphs, opened_variants
from engines.backends.trt_engine import Plan
from engines.backends.trt_maker import PlanMaker, Progress
from engines.backends.trt_options import PLAN_OPTIONS, PlanOptions
from engines.backends.trt_plan import PlanRecord, read_record
from engines.backends.trt_process import require_targets
from engines.backends.trt_product import TENSORRT, TENSORRT_RTX, Product, this_platform
from engines.backends.trt_profiles import shortest_text
from engines.backends.trt_recipe import RecipeMaker, finish
from engines.backends.trt_session import PlanSession
from engines.bundle import Bundle
from engines.manifest import Engine
from engines.plugins import ptx
from engines.session import Session

# Those of ONNX Runtime, because it is one option: "cpu" is that option's default, which says nothing here.
_PROVIDERS = ("cpu", "cuda", "cuda-graphs")


class Backend:
    """What ``engines.backends`` asks of one, for one product."""

    def __init__(self, product: Product) -> None:
        self.product = product
        self.NAME = product.name
        self._lock = threading.Lock()
        self._lanes: Lanes | None = None

    # --- what is installed

    def unavailable(self) -> str:
        """Why the library cannot be used, or an empty text."""
        return self.product.unavailable()

    def require(self) -> None:
        """DependencyError when the library cannot be used."""
        self.product.require()

    def version(self) -> str:
        """The installed version."""
        return self.product.version()

    def device_name(self, options: Mapping[str, Any]) -> str:
        """Key of this machine's latency profile; DependencyError without a device."""
        device = cuda.require_device(f"an engine of {self.product.title}")
        name = "".join(c if c.isalnum() else "-" for c in device.name.lower())
        return f"{name}-{self.NAME}" + ("" if _wants_graphs(options.get("provider", "")) else "-no-graphs")

    # --- building

    def builder(self, options: PlanOptions | None = None) -> PlanMaker | RecipeMaker:
        """A ``PlanMaker``, or where recipes are wanted or nothing else is possible, a ``RecipeMaker``."""
        options = options or PLAN_OPTIONS
        _require_meaning(self.product, options)
        if options.recipe:
            return RecipeMaker(self.product, options, "")
        reason = self.unavailable()
        if self.product.needs_device:
            if not reason and not cuda.devices():
                reason = f"{self.product.title} compiles on a GPU only, and none is here"
            if reason:
                return RecipeMaker(self.product, options, reason)
            if options.plugins:
                ptx.require_compiler()
            return PlanMaker(self.product, options)
        self.require()
        if options.strip and not cuda.devices():
            what = f"--strip-weights: {self.product.title} leaves weights out only where it finds a CUDA device"
            raise DependencyError(describe(what, hint="build without it, or with --recipe for a machine with a GPU"))
        if options.targets:
            require_targets(self.product.module, f"{self.product.title} {self.version()}", options.targets)
        return PlanMaker(self.product, options)

    # --- running

    def open_sessions(
        self,
        bundle: Bundle,
        variants: Sequence[str] | None = None,
        *,
        threads: int | None = None,
        provider: str = "",
    ) -> dict[str, Session]:
        """As ``engines.session.Backend``. What can be known of plan and device is checked before the library is asked.

        ``provider`` "cuda" runs without CUDA graphs; all others mean what is best. InputError for an unknown one.
        """
        cuda_graphs = _wants_graphs(provider)
        names = known_variants(bundle, variants)
        self._require_plans(bundle, [graph for name in names for graph in needed_graphs(bundle, name)])
        return opened_variants(bundle, names, lambda graph, name: self._open(bundle, graph, name, cuda_graphs))

    def open_graphs(
        self,
        bundle: Bundle,
        graphs: Sequence[str],
        *,
        threads: int | None = None,
        provider: str = "",
    ) -> dict[str, PlanSession]:
        """Sessions of single graphs; arguments and errors as ``open_sessions``."""
        cuda_graphs = _wants_graphs(provider)
        self._require_plans(bundle, graphs)
        return opened_graphs(graphs, lambda graph, name: self._open(bundle, graph, name, cuda_graphs))

    def shortest_text(self, bundle: Bundle) -> int:
        """As ``engines.session.Backend``: what plans were built for may begin at more than one token."""
        engines = [engine for engine in bundle.manifest.engines.values() if engine.backend == self.NAME]
        records = [self._record(bundle, engine) for engine in engines]
        return max((shortest_text(record.inputs, record.profiles) for record in records), default=1)

    def _require_plans(self, bundle: Bundle, graphs: Sequence[str]) -> None:
        """All errors that need no library."""
        self.require()
        device = cuda.require_device(f"an engine of {self.product.title}")
        for graph in dict.fromkeys(graphs):
            self.checked_plan(bundle, graph, device)

    def _open(self, bundle: Bundle, graph: str, name: str, cuda_graphs: bool) -> PlanSession:
        """The session of a graph, which calls itself ``name`` in messages."""
        device = cuda.require_device(f"an engine of {self.product.title}")
        path, record = self.checked_plan(bundle, graph, device)
        facts = bundle.manifest.graphs[graph]
        library, source = importlib.import_module(self.product.module), bundle.file(facts.path)
        plan = Plan(library, self.product, name, path, source, record, cuda_graphs)
        captured = cuda_graphs and not self.product.captures
        lanes = self._joined_lanes()
        try:
            return PlanSession(name, facts, plan, record.profiles, lanes, cuda_graphs=captured)
        finally:
            lanes.leave()

    def _joined_lanes(self) -> Lanes:
        """What all that is open at a time shares, so that a ratio more needs no scratch memory of its own.

        It is joined, because another thread may close the last engine that uses it; whoever asked has to leave.
        """
        with self._lock:
            if self._lanes is not None:
                with suppress(CompexportError):  # closed
                    self._lanes.join()
                    return self._lanes
            self._lanes = Lanes(CudaMemory())
            self._lanes.join()
            return self._lanes

    def checked_plan(self, bundle: Bundle, graph: str, device: cuda.Device) -> tuple[Path, PlanRecord]:
        """The plan of a graph for this library and device; BundleError says what the bundle has instead."""
        engines = [e for e in bundle.manifest.engines.values() if e.graph == graph and e.backend == self.NAME]
        precision = next(iter(bundle.manifest.variants.values())).precision
        hint = f"build it here with `{build_command(self.NAME, precision)}`"
        if not engines:
            recipes = any(e.backend == f"{self.NAME}-recipe" for e in bundle.manifest.engines.values())
            hint = f"`compexport build --from-recipe {bundle.path}` builds it here" if recipes else hint
            got = "a recipe" if recipes else None
            raise BundleError(describe(f"{bundle.path}: no {self.NAME} engine of {graph}", got=got, hint=hint))
        found: tuple[str, str] | None = None
        for engine in engines:
            record = self._record(bundle, engine)
            found = self._mismatch(record, bundle.manifest.graphs[graph].key, device)
            if found is None:
                return bundle.file(engine.path), record
        assert found is not None
        got, expected = found
        raise BundleError(describe(f"{bundle.path}: the engine of {graph}", got=got, expected=expected, hint=hint))

    def _record(self, bundle: Bundle, engine: Engine) -> PlanRecord:
        record = read_record(bundle.file(_record_path(engine.path)))
        entry = bundle.manifest.files.get(engine.path)
        if entry is None or (record.sha256, record.size_bytes) != (entry.sha256, entry.size_bytes):
            raise BundleError(describe(f"{engine.path}: not the plan that its record describes"))
        return record

    def _mismatch(self, record: PlanRecord, graph_key: str, device: cuda.Device) -> tuple[str, str] | None:
        facts = {"product": self.NAME, "version": self.version(), "platform": this_platform()}
        if wrong := record.mismatch(graph_key=graph_key, **facts):
            return wrong
        if not record.runs_on(device):
            return f"a plan for {', '.join(record.targets)}", f"one for {device.capability} ({device.name})"
        return None


TRT, RTX = Backend(TENSORRT), Backend(TENSORRT_RTX)


def finish_recipes(path: str | Path, progress: Progress) -> Bundle:
    """Build the plans that the bundle at ``path`` has recipes of; errors as ``trt_recipe.finish``.

    DependencyError where they cannot be built here either.
    """

    def maker_of(product: str, options: PlanOptions) -> PlanMaker:
        backend = TRT if product == TRT.NAME else RTX
        maker = backend.builder(options)
        if isinstance(maker, RecipeMaker):
            raise DependencyError(describe("the recipes cannot be finished here", got=maker.reason))
        return maker

    return finish(path, maker_of, progress)


def _wants_graphs(provider: str) -> bool:
    """Whether CUDA graphs are made: by default, and not with "cuda". InputError for what is no provider."""
    if provider not in ("", *_PROVIDERS):
        raise InputError(describe("unknown provider", got=repr(provider), expected=f"one of {', '.join(_PROVIDERS)}"))
    return provider != "cuda"


def _require_meaning(product: Product, options: PlanOptions) -> None:
    """InputError for an option that this product does not have."""
    if options.targets is not None and not product.targets:
        hint = "plans fit the GPU that builds them, or with --hardware-compatible newer ones too"
        raise InputError(describe("--target", got=f"the backend {product.name}", expected="trt-rtx", hint=hint))
    if options.hardware_compatible and product.targets:
        hint = "--target names the cards"
        raise InputError(
            describe("--hardware-compatible", got=f"the backend {product.name}", expected="trt", hint=hint)
        )
    if options.plugins and product.targets:
        hint = f"{product.title} has no plugins"
        raise InputError(describe("--plugins", got=f"the backend {product.name}", expected="trt", hint=hint))
    if options.level is not None and not 0 <= options.level <= 5:
        raise InputError(describe("--level", got=options.level, expected="0 (quick to build) to 5 (quick to run)"))


def _record_path(plan: str) -> str:
    return plan.removesuffix(".plan") + ".json"
