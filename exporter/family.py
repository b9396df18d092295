"""From a model folder to a bundle: trace once, bind every ratio, check each against PyTorch, build engines.

What is already in the bundle and was made from the same inputs is reused; with nothing to do, nothing is imported.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.errors import CompexportError, InputError, describe
from engines import backends
from engines.bundle import Bundle, BundleWriter
from engines.manifest import Engine, Graph, Manifest, Precision, Variant
from exporter.checkpoint import MethodCheckpoint, find_checkpoint
from exporter.identity import backbone_sha256, graph_key, label_words_sha256, library_versions

if TYPE_CHECKING:
    from exporter.graphs import Family

METHOD = "variator"
WEIGHTS = "graphs/weights.bin"

Progress = Callable[[str, float | None, float | None], None]


def _silent(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""


@dataclass(frozen=True)
class Plan:
    """What to build; everything here enters the graphs' keys."""

    folder: Path
    ratios: tuple[int, ...]
    checkpoint: MethodCheckpoint | None
    task: str | None = None
    precision: Precision = "fp32"
    untrained: bool = False
    seed: int = 0

    def trained(self, ratio: int) -> bool:
        """Whether the checkpoint holds plugins for ``ratio``."""
        return self.checkpoint is not None and ratio in self.checkpoint.ratios

    def variant(self, ratio: int) -> str:
        return f"{METHOD}-r{ratio}-{self.precision}"

    def graph(self, ratio: int) -> str:
        return f"r{ratio}"


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
        }

    def _row(self, name: str, variant: Variant) -> dict[str, Any]:
        graph = variant.graphs["encoder"]
        return {
            "variant": name,
            "method": variant.method,
            "ratio": variant.ratio,
            "precision": variant.precision,
            "flops_ratio": variant.flops_ratio,
            "params": variant.params,
            "extra_params": variant.extra_params,
            "parity_max_abs": self.manifest.graphs[graph].parity.max_abs,
            "untrained": variant.untrained,
            "reused": graph in self.reused,
        }


def build(
    folder: str | Path,
    ratios: Sequence[int],
    output: str | Path,
    *,
    task: str | None = None,
    checkpoint: MethodCheckpoint | None = None,
    backend: str = "ort",
    precision: Precision = "fp32",
    untrained: bool = False,
    seed: int = 0,
    command: str = "",
    progress: Progress = _silent,
) -> BuildReport:
    """Build the backbone in ``folder`` and its ``ratios`` into the bundle ``output``.

    Plugins come from ``checkpoint``, by default the one in ``folder``; ``untrained`` allows random ones, which the
    manifest then says. Raises InputError for bad input and ParityError for a graph that differs from PyTorch; then
    ``output`` is what it was before.
    """
    started = time.perf_counter()
    folder = Path(folder)
    plan = Plan(
        folder,
        tuple(sorted({1, *ratios})),
        checkpoint or (find_checkpoint(folder) if folder.is_dir() else None),
        task,
        precision,
        untrained,
        seed,
    )
    _require_plugins(plan)
    runtime = backends.load(backend)
    keys = _graph_keys(plan)
    with BundleWriter(output) as writer:
        previous = writer.previous
        if previous is not None and _is_current(previous, plan, keys, runtime):
            return BuildReport(previous.path, time.perf_counter() - started, previous.manifest, set(keys))
        manifest, reused = _write(writer, plan, keys, runtime, command, progress)
        progress("writing the bundle", None, None)
        bundle = writer.commit(manifest)
    return BuildReport(bundle.path, time.perf_counter() - started, bundle.manifest, reused)


def _require_plugins(plan: Plan) -> None:
    missing = [ratio for ratio in plan.ratios if ratio != 1 and not plan.trained(ratio)]
    if not missing or plan.untrained or not (plan.folder / "config.json").is_file():
        return  # a folder without a model gets its own message from load_backbone
    names = ",".join(map(str, missing))
    raise InputError(
        describe(
            f"{plan.folder}: no trained plugins for ratio {names}",
            got=f"ratios {plan.checkpoint.ratios}" if plan.checkpoint else "a bare model",
            hint=f"fit them with `compexport train {METHOD} {plan.folder} --ratio {names} --data TEXTS -o OUT`, "
            "or give --data here, or pass --untrained for latency work",
        )
    )


def _graph_keys(plan: Plan) -> dict[str, str]:
    """Graph name -> hash of all it is made from."""
    if not (plan.folder / "config.json").is_file():
        from exporter.backbone import load_backbone

        load_backbone(plan.folder)  # raises the error that says what is missing
    backbone, words = backbone_sha256(plan.folder), label_words_sha256(plan.folder)
    keys = {}
    for ratio in plan.ratios:
        plugins = None
        if ratio != 1:
            trained = plan.checkpoint is not None and plan.trained(ratio)
            plugins = plan.checkpoint.sha256(ratio) if plan.checkpoint and trained else f"untrained {plan.seed}"
        pad = plan.checkpoint.pad if plan.checkpoint else "masked"
        keys[plan.graph(ratio)] = graph_key(
            backbone=backbone,
            words=words,
            ratio=ratio,
            plugins=plugins,
            pad=pad,
            precision=plan.precision,
            task=plan.task,
        )
    return keys


def _is_current(bundle: Bundle, plan: Plan, keys: Mapping[str, str], runtime: Any) -> bool:
    """Whether the bundle already is what would be built: same graphs, and engines for this machine."""
    manifest = bundle.manifest
    engines = {engine.graph: engine.key for engine in manifest.engines.values() if engine.backend == runtime.NAME}
    return (
        {name: graph.key for name, graph in manifest.graphs.items()} == keys
        and set(manifest.variants) == {plan.variant(ratio) for ratio in plan.ratios}
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
    from exporter.graphs import Family

    total = 2 * len(plan.ratios) + 2
    progress(f"loading {plan.folder}", 0, total)
    family = Family.load(plan)
    (writer.dir / "tokenizer.json").write_text(family.backbone.tokenizer_json, encoding="utf-8")
    engines = _reused_engines(writer, keys, runtime)
    with runtime.EngineBuilder(writer.dir, f"engines/{runtime.NAME}-cpu") as builder:
        written = (lambda name, graph: None) if engines is not None else builder.add
        graphs, reused = _write_graphs(writer, plan, family, keys, written, progress, total)
        if engines is None:
            step = len(plan.ratios) + 1
            engines = builder.finish(lambda message: progress(message, step, total))
            family.check_engines(writer.dir, engines, runtime)
    manifest = Manifest(
        backbone=family.describe(),
        method=METHOD,
        task=family.backbone.task,
        labels=family.backbone.labels,
        pooling=str(family.backbone.pooling) if family.backbone.pooling else None,
        tokenizer=family.tokenizer("tokenizer.json"),
        label_words=family.backbone.label_words,
        variants={plan.variant(ratio): family.variant(ratio) for ratio in plan.ratios},
        graphs=graphs,
        engines={f"{name}-{runtime.NAME}-cpu": engine for name, engine in engines.items()},
        files={},
        versions={**library_versions(), runtime.NAME: runtime.version()},
        command=command,
    )
    return manifest, reused


def _write_graphs(
    writer: BundleWriter,
    plan: Plan,
    family: Family,
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
        for step, ratio in enumerate(plan.ratios, start=1):
            name = plan.graph(ratio)
            old = _same_graph(writer.previous, name, keys[name])
            progress(f"{'reusing' if old else 'tracing and checking'} ratio {ratio}", step, total)
            path = f"graphs/{name}.onnx"
            if old is not None and writer.previous is not None:
                weights.adopt(writer.previous.file(old.path), writer.dir / path)
                graphs[name] = old
                reused.add(name)
            else:
                graphs[name] = family.write_graph(ratio, writer.dir, path, weights, keys[name])
            weights.flush()
            written(name, graphs[name])
    return graphs, reused


def _same_graph(previous: Bundle | None, name: str, key: str) -> Graph | None:
    """The previous bundle's graph if it was made from the same inputs and is undamaged."""
    graph = previous.manifest.graphs.get(name) if previous else None
    if previous is None or graph is None or graph.key != key:
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
    old = {e.graph: e for e in writer.previous.manifest.engines.values() if e.backend == runtime.NAME}
    if {name: e.key for name, e in old.items()} != {name: runtime.engine_key(key) for name, key in keys.items()}:
        return None
    files = sorted({file for engine in old.values() for file in engine.files})
    if not all(writer.reusable(file) for file in files):
        return None
    for file in files:
        writer.reuse(file)
    return old
