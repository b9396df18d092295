"""What the graphs of all methods have in common: written into one weights file, compared with PyTorch, described."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import onnx

from engines.manifest import Backbone as BackboneRecord
from engines.manifest import Cost, Engine, Generation, Graph, LabelWords, Parity, Task, Tokenizer, Variant
from exporter import parity, trace
from exporter.graphs.widened import WidenedSession, rounded_feed, widened_feed
from exporter.plans import Plan, PlannedGraph
from exporter.precision import EXACT, PLAIN, Arithmetic, WideSums
from exporter.weights import WeightsFile

REPORTED_LENGTH = 128  # the length at which FLOPs ratios are quoted

Run = Callable[[parity.Arrays], list[np.ndarray]]


class Described(Protocol):
    """What a manifest says of a loaded model."""

    @property
    def folder(self) -> Path: ...
    @property
    def model(self) -> Any: ...
    @property
    def max_length(self) -> int: ...
    @property
    def config(self) -> Any: ...
    @property
    def task(self) -> Task: ...
    @property
    def labels(self) -> list[str]: ...
    @property
    def pooling(self) -> object | None: ...
    @property
    def label_words(self) -> LabelWords | None: ...
    @property
    def input_names(self) -> tuple[str, ...]: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def params(self) -> int: ...
    @property
    def sha256(self) -> str: ...
    @property
    def tokenizer_json(self) -> str: ...


Loaded = TypeVar("Loaded", bound=Described)


class Family(ABC, Generic[Loaded]):
    """A loaded backbone and all its plan asks for. A method says how one graph is made and what it must compute."""

    def __init__(self, plan: Plan, backbone: Loaded) -> None:
        self.plan = plan
        self.backbone = backbone
        self._expected: dict[str, tuple[parity.Arrays, list[np.ndarray]]] = {}

    # --- what a method says

    @abstractmethod
    def model(self, graph: PlannedGraph, weights: WeightsFile) -> onnx.ModelProto:
        """The graph; what several share may have been moved to ``weights`` already."""

    @abstractmethod
    def cost(self, graph: PlannedGraph) -> Cost:
        """MACs of the graph."""

    @abstractmethod
    def feeds(self, graph: PlannedGraph) -> list[parity.Arrays]:
        """Valid inputs of several shapes, the largest last."""

    @abstractmethod
    def by_pytorch(self, graph: PlannedGraph, arithmetic: Arithmetic) -> Run:
        """What the graph must compute, by eager PyTorch in this arithmetic; nothing is copied before it is asked.

        Floating-point arrays are taken in any type, and those that come out are fp32 or fp64.
        """

    def read(self, graph: PlannedGraph, feed: parity.Arrays, outputs: list[np.ndarray]) -> list[np.ndarray]:
        """``outputs`` with 0 where nobody reads them, and where half precision may give anything."""
        return outputs

    @abstractmethod
    def variant(self, ratio: float) -> Variant:
        """The entry of one ratio."""

    def variants(self) -> dict[str, Variant]:
        """The entries of all variants, by name."""
        return {self.plan.variant(ratio): self.variant(ratio) for ratio in self.plan.ratios}

    def max_length(self) -> int:
        """How many tokens all of the family's graphs take."""
        return self.backbone.max_length

    # --- graphs

    def write_graph(self, graph: PlannedGraph, root: Path, path: str, weights: WeightsFile, key: str) -> Graph:
        """Make one graph, write it to ``root/path``, compare it with PyTorch; ParityError if they differ."""
        model = self.model(graph, weights)
        weights.move_out(model)
        weights.flush()
        (root / path).write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(root / path))
        session = (_PlainSession if self.plan.precision == "fp32" else WidenedSession)(root / path)
        return Graph(
            path=path,
            opset=trace.OPSET,
            inputs=session.inputs,
            outputs=session.outputs,
            cost=self.cost(graph),
            parity=self._check(graph, session),
            key=key,
        )

    def check_weights(self, graphs: Sequence[Path]) -> None:
        """Whatever a method promises of how its graphs, all of them written, share their weights; ValueError if not."""

    def check_engines(self, root: Path, engines: Mapping[str, Engine], runtime: Any) -> None:
        """Compare every engine with what PyTorch gave for its graph; ParityError if one differs."""
        graphs = {graph.name: graph for graph in self.plan.graphs()}
        for name, engine in engines.items():
            inner = runtime.open_file(root / engine.path)
            run = _runner(inner)
            if name not in self._expected:
                feed = rounded_feed(self.feeds(graphs[name])[-1], runtime.tensor_specs(inner.get_inputs()))
                self._expected[name] = feed, self.by_pytorch(graphs[name], PLAIN)(widened_feed(feed))
            feed, expected = self._expected[name]
            if self.plan.precision == "fp32":
                exact = self.by_pytorch(graphs[name], EXACT)
                parity.compare(f"engine {name}", _always(expected), run, [feed], parity.TOLERANCE["fp32"], exact)
                continue
            # The choices of one feed's rows say little; those of all feeds were compared with the graph.
            allowed = replace(parity.ROUNDING[self.plan.precision], same_choice=0.0)
            outputs = [value.name for value in inner.get_outputs()]
            wanted, found = (self.read(graphs[name], feed, made) for made in (expected, run(feed)))
            parity.compare_rounding(f"engine {name}", outputs, [wanted], [found], allowed)

    def _check(self, graph: PlannedGraph, session: _PlainSession | WidenedSession) -> Parity:
        """Compare a graph with PyTorch, and, where its precision is below fp32, that precision with fp32."""
        kept = [rounded_feed(feed, session.inputs) for feed in self.feeds(graph)]
        feeds = [widened_feed(feed) for feed in kept]
        plain = self.by_pytorch(graph, PLAIN)
        expected = [plain(feed) for feed in feeds]
        self._expected[graph.name] = kept[-1], expected[-1]
        precision = self.plan.precision
        if precision == "fp32":
            same, exact = _listed(feeds, expected), self.by_pytorch(graph, EXACT)
            return parity.compare(graph.name, same, session.run, feeds, parity.TOLERANCE[precision], exact)
        return self._check_half(graph, session, feeds, expected)

    def _check_half(
        self,
        graph: PlannedGraph,
        session: _PlainSession | WidenedSession,
        feeds: Sequence[parity.Arrays],
        expected: Sequence[list[np.ndarray]],
    ) -> Parity:
        """Compare a widened graph with the rounded weights in fp32, and half arithmetic with what fp32 gave."""
        precision = self.plan.precision
        allowed = parity.ROUNDING[precision]
        rounded, exact, half = (
            self._what_is_read(graph, self.by_pytorch(graph, Arithmetic(kind, precision)))
            for kind in ("rounded", "rounded exact", "half")
        )
        largest = max(float(np.max(np.abs(output), initial=0.0)) for outputs in expected for output in outputs)
        tolerance = max(parity.TOLERANCE["fp32"], parity.TIE * allowed.epsilon * largest)
        widened = self._what_is_read(graph, session.run)
        found = parity.compare(f"{graph.name}, widened,", rounded, widened, feeds, tolerance, exact)
        with WideSums():
            computed = [half(feed) for feed in feeds]
        wanted = [self.read(graph, feed, outputs) for feed, outputs in zip(feeds, expected, strict=True)]
        outputs = [spec.name for spec in session.outputs]
        rounding = parity.compare_rounding(graph.name, outputs, wanted, computed, allowed)
        return found.model_copy(update={"rounding": rounding})

    def _what_is_read(self, graph: PlannedGraph, run: Run) -> Run:
        return lambda feed: self.read(graph, feed, run(feed))

    def id_feeds(self, group: int) -> list[parity.Arrays]:
        """Random ids, masks and types at lengths around one and three groups of tokens."""
        config = self.backbone.config
        return parity.probe_feeds(
            self.backbone.input_names,
            group,
            int(config.vocab_size),
            self.max_length(),
            int(getattr(config, "type_vocab_size", 1) or 1),
            int(config.pad_token_id or 0),
        )

    # --- records for the manifest

    def write_settings(self, folder: Path) -> None:
        """Write to ``folder``, which there is not yet, what other tools want of the model; nothing by default."""

    def describe(self) -> BackboneRecord:
        """The backbone's entry."""
        backbone = self.backbone
        return BackboneRecord(
            name=backbone.folder.resolve().name,
            architecture=type(backbone.model).__name__,
            model_type=backbone.config.model_type,
            sha256=backbone.sha256,
            params=backbone.params,
            hidden_size=backbone.hidden_size,
            layers=backbone.num_layers,
        )

    def tokenizer(self, path: str) -> Tokenizer:
        """The tokenizer's entry."""
        return Tokenizer(
            path=path,
            max_length=self.max_length(),
            pad_id=int(self.backbone.config.pad_token_id or 0),
            inputs=list(self.backbone.input_names),
        )

    def generation(self) -> Generation | None:
        """What generating text needs to know; None for models that do something else."""
        return None


def _listed(feeds: Sequence[parity.Arrays], outputs: Sequence[list[np.ndarray]]) -> Run:
    """What was computed for each of these feeds already."""
    made = {id(feed): found for feed, found in zip(feeds, outputs, strict=True)}
    return lambda feed: made[id(feed)]


def _always(outputs: list[np.ndarray]) -> Run:
    return lambda feed: outputs


class _PlainSession:
    """The graph as any user of ONNX Runtime would run it."""

    def __init__(self, path: Path) -> None:
        from engines.backends import ort

        inner = ort.open_file(path, optimised=False)
        self.inputs = ort.tensor_specs(inner.get_inputs())
        self.outputs = ort.tensor_specs(inner.get_outputs())
        self.run = _runner(inner)


def _runner(inner: Any) -> Run:
    def run(feed: parity.Arrays) -> list[np.ndarray]:
        outputs: list[np.ndarray] = inner.run(None, feed)
        return outputs

    return run
