"""From a model folder to a bundle: trace once, bind every ratio, check each against PyTorch, build engines.

What is already in the bundle and was made from the same inputs is reused; with nothing to do, nothing is imported.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.errors import CompexportError
from engines import backends
from engines.backends.trt_options import PlanOptions
from engines.bundle import Bundle, BundleWriter
from engines.manifest import MODEL_SETTINGS, Engine, Graph, Manifest, Precision, Variant, engine_rows
from exporter.checkpoint import MethodCheckpoint, find_checkpoint, plain_ratio
from exporter.identity import library_versions
from exporter.plans import Plan, plan_of

if TYPE_CHECKING:
    from exporter.graphs.family import Family

_log = logging.getLogger(__name__)

WEIGHTS = "graphs/weights.bin"

Progress = Callable[[str, float | None, float | None], None]


def _silent(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""


@dataclass
class BuildReport:
    """What was built: ``document`` is what ``build --json`` prints."""

    bundle: Path
    seconds: float
    manifest: Manifest
    reused: set[str] = field(default_factory=set)

    def document(self) -> dict[str, Any]:
        """The keys of design.md's ``build`` document."""
        return {
            "bundle": str(self.bundle),
            "seconds": self.seconds,
            "variants": [self._row(name, variant) for name, variant in self.manifest.variants.items()],
            "engines": engine_rows(self.manifest),
        }

    def _row(self, name: str, variant: Variant) -> dict[str, Any]:
        graphs = [self.manifest.graphs[graph] for graph in variant.graphs.values()]
        changes = [graph.parity.rounding.max_relative for graph in graphs if graph.parity.rounding is not None]
        return {
            "variant": name,
            "method": variant.method,
            "ratio": variant.ratio,
            "precision": variant.precision,
            "flops_ratio": variant.flops_ratio,
            "params": variant.params,
            "extra_params": variant.extra_params,
            "parity_max_abs": max(graph.parity.max_abs for graph in graphs),
            **({"rounding_max_relative": max(changes)} if changes else {}),
            "untrained": variant.untrained,
            "reused": self.reused.issuperset(variant.graphs.values()),
        }


def build(
    folder: str | Path,
    ratios: Sequence[float],
    output: str | Path,
    *,
    method: str | None = None,
    task: str | None = None,
    checkpoint: MethodCheckpoint | None = None,
    backend: str = "ort",
    plans: PlanOptions | None = None,
    precision: Precision = "fp32",
    untrained: bool = False,
    seed: int = 0,
    command: str = "",
    progress: Progress = _silent,
    **options: Any,
) -> BuildReport:
    """Build the backbone in ``folder`` and its ``ratios`` into the bundle ``output``.

    What is trained comes from ``checkpoint``, by default the one in ``folder``; ``untrained`` allows random tensors,
    which the manifest then says. ``method`` is by default the checkpoint's; ``options`` are those of its plan; for
    TensorRT there are ``plans``. Engines of other backends and devices stay in the bundle while their graphs do. Raises
    InputError for bad input and ParityError for a graph that differs from PyTorch; then ``output`` is what it was
    before.
    """
    started = time.perf_counter()
    folder = Path(folder)
    if checkpoint is None and folder.is_dir():
        checkpoint = find_checkpoint(folder, method)
    plan = plan_of(folder, method, checkpoint)(
        folder=folder,
        ratios=tuple(sorted({1, *map(plain_ratio, ratios)})),
        checkpoint=checkpoint,
        task=task,
        precision=precision,
        untrained=untrained,
        seed=seed,
        **options,
    )
    plan.require_trained()
    for line in plan.warnings():
        _log.warning(line)
    runtime = backends.builder(backend, plans, precision)
    if runtime.NOTE:
        _log.warning(runtime.NOTE)
    keys = plan.keys()
    with BundleWriter(output) as writer:
        previous = writer.previous
        if previous is not None and _is_current(previous, plan, keys, runtime):
            return BuildReport(previous.path, time.perf_counter() - started, previous.manifest, set(keys))
        if previous is not None and (lost := _lost(previous, keys, runtime)):
            _log.warning(f"{previous.path} holds {lost}, which go: their graphs are replaced; build for these again")
        manifest, reused = _write(writer, plan, keys, runtime, command, progress)
        progress("writing the bundle", None, None)
        bundle = writer.commit(manifest)
    return BuildReport(bundle.path, time.perf_counter() - started, bundle.manifest, reused)


def _is_current(bundle: Bundle, plan: Plan, keys: Mapping[str, str], runtime: Any) -> bool:
    """Whether the bundle already is what would be built: same graphs, and engines for this machine."""
    manifest = bundle.manifest
    engines = {engine.graph: engine.key for engine in _own_engines(bundle, runtime).values()}
    return (
        {name: graph.key for name, graph in manifest.graphs.items()} == keys
        and {name: variant.graphs for name, variant in manifest.variants.items()} == plan.variants()
        and plan.describes(manifest.variants)
        and engines == {name: runtime.engine_key(key) for name, key in keys.items()}
        and not bundle_damaged(bundle)
    )


def bundle_damaged(bundle: Bundle) -> bool:
    """Whether a file of the bundle no longer has the recorded content."""
    try:
        for rel in bundle.manifest.files:
            bundle.file(rel)
    except CompexportError:
        return True
    return False


def _write(
    writer: BundleWriter, plan: Plan, keys: Mapping[str, str], runtime: Any, command: str, progress: Progress
) -> tuple[Manifest, set[str]]:
    """Fill the staging folder; the manifest and the names of the graphs that were reused."""
    total = 2 * len(keys) + 2
    progress(f"loading {plan.folder}", 0, total)
    family = plan.load()
    (writer.dir / "tokenizer.json").write_text(family.backbone.tokenizer_json, encoding="utf-8")
    engines = _reused_engines(writer, keys, runtime)
    with runtime.EngineBuilder(writer.dir, runtime.FOLDER, family.max_length(), writer.previous) as builder:
        written = (lambda name, graph: None) if engines is not None else builder.add
        graphs, reused = _write_graphs(writer, plan, family, keys, written, progress, total)
        if engines is None:
            step = len(keys) + 1

            def tell(message: str, done: float | None = None, of: float | None = None) -> None:
                progress(message, step if of is None else done, of or total)

            engines = builder.finish(tell)
            if runtime.RUNS_HERE:
                family.check_engines(writer.dir, engines, runtime)
    family.write_settings(writer.dir / MODEL_SETTINGS)
    others = _other_engines(writer, keys, runtime)
    manifest = Manifest(
        backbone=family.describe(),
        method=plan.method,
        task=family.backbone.task,
        labels=family.backbone.labels,
        pooling=str(family.backbone.pooling) if family.backbone.pooling else None,
        tokenizer=family.tokenizer("tokenizer.json"),
        label_words=family.backbone.label_words,
        generation=family.generation(),
        variants=family.variants(),
        graphs=graphs,
        engines={**{f"{name}-{_place(runtime)}": engine for name, engine in engines.items()}, **others},
        files={},
        versions={
            **{engine.backend: engine.backend_version for engine in others.values()},
            **library_versions(),
            runtime.NAME: runtime.version(),
        },
        command=command,
    )
    return manifest, reused


def _write_graphs(
    writer: BundleWriter,
    plan: Plan,
    family: Family[Any],
    keys: Mapping[str, str],
    written: Callable[[str, Graph], None],
    progress: Progress,
    total: int,
) -> tuple[dict[str, Graph], set[str]]:
    """Every graph and the one weights file they share; graphs with an unchanged key keep their recorded parity.

    ``written`` is called with each as soon as its files are complete.
    """
    from exporter.weights import WeightsFile

    (writer.dir / "graphs").mkdir()
    graphs: dict[str, Graph] = {}
    reused = set()
    with WeightsFile(writer.dir / WEIGHTS) as weights:
        for step, graph in enumerate(plan.graphs(), start=1):
            old = _same_graph(writer.previous, graph.name, keys[graph.name])
            progress(f"{'reusing' if old else 'tracing and checking'} {graph.label}", step, total)
            path = f"graphs/{graph.name}.onnx"
            if old is not None and writer.previous is not None:
                weights.adopt(writer.previous.file(old.path), writer.dir / path)
                graphs[graph.name] = old.model_copy(update={"path": path})
                reused.add(graph.name)
            else:
                graphs[graph.name] = family.write_graph(graph, writer.dir, path, weights, keys[graph.name])
            weights.flush()
            written(graph.name, graphs[graph.name])
    family.check_weights([writer.dir / graph.path for graph in graphs.values()])
    return graphs, reused


def _same_graph(previous: Bundle | None, name: str, key: str) -> Graph | None:
    """The previous bundle's graph made from the same inputs, whatever its name there, if it is undamaged."""
    if previous is None:
        return None
    there = previous.manifest.graphs
    graph = next(
        (found for _, found in sorted(there.items(), key=lambda one: one[0] != name) if found.key == key), None
    )
    if graph is None:
        return None
    try:
        previous.file(graph.path)
        previous.file(WEIGHTS)
    except CompexportError:
        return None
    return graph


def _reused_engines(writer: BundleWriter, keys: Mapping[str, str], runtime: Any) -> dict[str, Engine] | None:
    """The previous engines, brought along, if they belong to graphs with these keys; None when any must be built."""
    if writer.previous is None:
        return None
    old = {engine.graph: engine for engine in _own_engines(writer.previous, runtime).values()}
    if {name: e.key for name, e in old.items()} != {name: runtime.engine_key(key) for name, key in keys.items()}:
        return None
    files = sorted({file for engine in old.values() for file in engine.files})
    if not all(writer.reusable(file) for file in files):
        return None
    for file in files:
        writer.reuse(file)
    return old


def _own_engines(bundle: Bundle, runtime: Any) -> dict[str, Engine]:
    """The bundle's engines of this backend and device, by name."""
    place = f"{runtime.FOLDER}/"
    return {name: engine for name, engine in bundle.manifest.engines.items() if engine.path.startswith(place)}


def _split_others(bundle: Bundle, keys: Mapping[str, str], runtime: Any) -> tuple[dict[str, Engine], dict[str, Engine]]:
    """The bundle's engines of other backends and devices: those whose graphs stay, and those whose graphs do not."""
    manifest, own = bundle.manifest, _own_engines(bundle, runtime)
    same = {name for name, graph in manifest.graphs.items() if keys.get(name) == graph.key}
    others = {name: engine for name, engine in manifest.engines.items() if name not in own}
    staying = {name: engine for name, engine in others.items() if engine.graph in same}
    return staying, {name: engine for name, engine in others.items() if name not in staying}


def _lost(bundle: Bundle, keys: Mapping[str, str], runtime: Any) -> str:
    """What a build throws away that it does not make anew, in words; empty where there is nothing."""
    _, going = _split_others(bundle, keys, runtime)
    places = Counter((engine.backend, engine.device) for engine in going.values())
    return ", ".join(f"{count} engine(s) of {backend} ({device})" for (backend, device), count in places.items())


def _other_engines(writer: BundleWriter, keys: Mapping[str, str], runtime: Any) -> dict[str, Engine]:
    """The previous engines of other backends and devices, brought along where they are whole and of the same graphs."""
    if writer.previous is None:
        return {}
    staying, _ = _split_others(writer.previous, keys, runtime)
    kept = {name: engine for name, engine in staying.items() if all(map(writer.reusable, engine.files))}
    for file in sorted({file for engine in kept.values() for file in engine.files}):
        writer.reuse(file)
    return kept


def _place(runtime: Any) -> str:
    """Backend and device, as names of engines and their folder have it."""
    return str(runtime.FOLDER).rsplit("/", 1)[1]
