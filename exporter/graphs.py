"""One family's graphs: bound from one trace, compared with PyTorch, described for the manifest."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch

from compexport.errors import InputError, describe
from engines.manifest import Backbone as BackboneRecord
from engines.manifest import Engine, Graph, Tokenizer, Variant
from exporter import parity, passes, trace
from exporter.backbone import Backbone, load_backbone
from exporter.methods import variator
from exporter.methods.variator import VariatorModel, VariatorPlugins
from exporter.weights import WeightsFile

if TYPE_CHECKING:
    from exporter.family import Plan

TEMPLATE_RATIO, TEMPLATE_WIDTH = 2, 4
REPORTED_LENGTH = 128  # the length at which FLOPs ratios are quoted
PLUGINS = "variator.plugins."


class Family:
    """A backbone and the plugins of every ratio of a plan."""

    def __init__(self, plan: Plan, backbone: Backbone, plugins: Mapping[int, VariatorPlugins]) -> None:
        self.plan = plan
        self.backbone = backbone
        self.plugins = plugins
        self._model = VariatorModel(backbone).eval()
        self._expected: dict[str, tuple[parity.Arrays, list[np.ndarray]]] = {}

    @classmethod
    def load(cls, plan: Plan) -> Family:
        """Load the backbone and its plugins, random ones where the plan allows; InputError as their loaders raise."""
        backbone = load_backbone(plan.folder, plan.task)
        return cls(plan, backbone, {r: _plugins(plan, backbone, r) for r in plan.ratios if r != 1})

    # --- graphs

    def write_graph(self, ratio: int, root: Path, path: str, weights: WeightsFile, key: str) -> Graph:
        """Bind ``ratio``, write it to ``root/path``, compare it with PyTorch; ParityError if they differ."""
        model = self._bound(ratio, weights)
        weights.move_out(model)
        weights.flush()
        (root / path).write_bytes(model.SerializeToString())
        onnx.checker.check_model(str(root / path))
        session = _plain_session(root / path)
        return Graph(
            path=path,
            opset=trace.OPSET,
            inputs=session.inputs,
            outputs=session.outputs,
            cost=variator.cost(self.backbone, self.plugins.get(ratio)),
            parity=self._check(ratio, session.run),
            key=key,
        )

    def check_engines(self, root: Path, engines: Mapping[str, Engine], runtime: Any) -> None:
        """Compare every engine with what PyTorch gave for its graph; ParityError if one differs."""
        for name, engine in engines.items():
            if name not in self._expected:
                self._expected[name] = self._reference_probe(name)
            feed, expected = self._expected[name]
            run = _runner(runtime.open_file(root / engine.path))
            exact = self._exact(self._ratio(name))
            parity.compare(f"engine {name}", _always(expected), run, [feed], self._tolerance, exact)

    def _bound(self, ratio: int, weights: WeightsFile) -> onnx.ModelProto:
        # Once for all ratios; the second time there is nothing left to move.
        weights.move_out(self._masked_template, but=PLUGINS)
        if ratio == 1:
            return passes.without_merging(self._masked_template)
        plugins = self.plugins[ratio]
        tensors = {f"{PLUGINS}{name}": t.numpy() for name, t in plugins.state_dict().items()}
        # "official" plugins pad the whole input to their ratio, outside the operators: they need a trace each.
        template = self._masked_template if plugins.pad == "masked" else self._template(ratio, plugins.pad)
        return passes.bind_ratio(template, ratio, tensors)

    @cached_property
    def _masked_template(self) -> onnx.ModelProto:
        return self._template(TEMPLATE_RATIO, "masked")

    def _template(self, ratio: int, pad: variator.PadMode) -> onnx.ModelProto:
        """A trace with throw-away plugins. Their values are random and thus all different, so that no initialiser of
        theirs is taken for an equal one of the backbone."""
        backbone = self.backbone
        plugins = VariatorPlugins(backbone.hidden_size, backbone.num_layers, ratio, TEMPLATE_WIDTH, pad)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in plugins.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        self._model.variator.attach(plugins.eval())
        template = trace.onnx_from_module(self._model, backbone.input_names, variator.output_names(backbone))
        self._model.variator.detach()
        return passes.with_divisions(passes.with_constant_lookups(template))

    # --- parity

    @property
    def _tolerance(self) -> float:
        return parity.TOLERANCE[self.plan.precision]

    def _check(self, ratio: int, candidate: Callable[[parity.Arrays], list[np.ndarray]]) -> Any:
        name = self.plan.graph(ratio)
        feeds = self._feeds(ratio)
        reference = self._reference(ratio)

        def remember(feed: parity.Arrays) -> list[np.ndarray]:
            outputs = reference(feed)
            if feed is feeds[-1]:
                self._expected[name] = (feed, outputs)
            return outputs

        return parity.compare(name, remember, candidate, feeds, self._tolerance, self._exact(ratio))

    def _reference_probe(self, name: str) -> tuple[parity.Arrays, list[np.ndarray]]:
        ratio = self._ratio(name)
        feed = self._feeds(ratio)[-1]
        return feed, self._reference(ratio)(feed)

    def _ratio(self, graph: str) -> int:
        return next(r for r in self.plan.ratios if self.plan.graph(r) == graph)

    def _feeds(self, ratio: int) -> list[parity.Arrays]:
        config = self.backbone.config
        return parity.probe_feeds(
            self.backbone.input_names,
            ratio,
            int(config.vocab_size),
            self._max_length(),
            int(getattr(config, "type_vocab_size", 1) or 1),
            int(config.pad_token_id or 0),
        )

    def _reference(self, ratio: int) -> Callable[[parity.Arrays], list[np.ndarray]]:
        """Eager PyTorch: for ratio 1 the Hugging Face model itself, otherwise the backbone with its plugins."""
        return lambda feed: _eager(self._model, self.plugins.get(ratio), feed)

    def _exact(self, ratio: int) -> Callable[[parity.Arrays], list[np.ndarray]]:
        """The same in float64; the copy is made only if it is ever asked."""

        def run(feed: parity.Arrays) -> list[np.ndarray]:
            model = copy.deepcopy(self.backbone.model).double()
            plugins = self.plugins.get(ratio)
            doubled = VariatorModel(dataclasses.replace(self.backbone, model=model)).eval()
            return _eager(doubled, copy.deepcopy(plugins).double() if plugins else None, feed)

        return run

    # --- records for the manifest

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
        config = self.backbone.config
        return Tokenizer(
            path=path,
            max_length=self._max_length(),
            pad_id=int(config.pad_token_id or 0),
            inputs=list(self.backbone.input_names),
        )

    def _max_length(self) -> int:
        """The model's limit; "official" plugins pad to their ratio and must not step over it."""
        limit = self.backbone.max_length
        padded = [limit // ratio * ratio for ratio, plugins in self.plugins.items() if plugins.pad == "official"]
        return max(1, min([limit, *padded]))

    def variant(self, ratio: int) -> Variant:
        """The entry of one ratio."""
        plugins = self.plugins.get(ratio)
        extra = plugins.params if plugins else 0
        full = variator.cost(self.backbone, None).macs(REPORTED_LENGTH)
        settings = {"pad": plugins.pad, "width": plugins.width, "k": ratio} if plugins else {}
        return Variant(
            method="variator",
            ratio=ratio,
            precision=self.plan.precision,
            graphs={"encoder": self.plan.graph(ratio)},
            params=self.backbone.params + extra,
            extra_params=extra,
            flops_ratio=full / variator.cost(self.backbone, plugins).macs(REPORTED_LENGTH),
            untrained=ratio != 1 and not self.plan.trained(ratio),
            settings=settings,
        )


def _always(outputs: list[np.ndarray]) -> Callable[[parity.Arrays], list[np.ndarray]]:
    return lambda feed: outputs


def _plugins(plan: Plan, backbone: Backbone, ratio: int) -> VariatorPlugins:
    checkpoint = plan.checkpoint
    if checkpoint is not None and plan.trained(ratio):
        plugins = VariatorPlugins.from_tensors(
            checkpoint.load(ratio),
            backbone.hidden_size,
            backbone.num_layers,
            "official" if checkpoint.pad == "official" else "masked",
            f"{checkpoint.folder}, ratio {ratio}",
        )
        if plugins.ratio != ratio:
            raise InputError(
                describe(f"{checkpoint.folder}: plugins of ratio {ratio}", got=f"tensors of ratio {plugins.ratio}")
            )
        return plugins
    with torch.random.fork_rng():
        torch.manual_seed(plan.seed + ratio)
        return VariatorPlugins(
            backbone.hidden_size, backbone.num_layers, ratio, variator.default_width(backbone, ratio)
        ).eval()


def _eager(model: VariatorModel, plugins: VariatorPlugins | None, feed: parity.Arrays) -> list[np.ndarray]:
    tensors = {name: torch.from_numpy(array) for name, array in feed.items()}
    with torch.inference_mode():
        if plugins is None:
            return [t.numpy() for t in _stock_outputs(model.backbone, tensors)]
        model.variator.attach(plugins)
        outputs = [t.numpy() for t in model(**tensors)]
        model.variator.detach()
        return outputs


def _stock_outputs(backbone: Backbone, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The outputs of the Hugging Face model as it is, pooled where the folder says so."""
    if backbone.label_words is not None:
        prefix = torch.tensor([backbone.label_words.decoder_input_ids] * len(tensors["input_ids"]))
        logits = backbone.model(**tensors, decoder_input_ids=prefix).logits
        return (logits[:, -1, backbone.label_words.word_ids],)
    outputs = backbone.model(**tensors)
    if backbone.task == "feature-extraction":
        hidden = outputs.last_hidden_state
        if backbone.pooling is None:
            return (hidden,)
        return hidden, variator.pool(hidden, tensors["attention_mask"], backbone)
    return tuple(outputs[name] for name in variator.output_names(backbone))


class _PlainSession:
    """The graph as any user of ONNX Runtime would run it."""

    def __init__(self, inner: Any) -> None:
        from engines.backends import ort

        self.inputs = ort.tensor_specs(inner.get_inputs())
        self.outputs = ort.tensor_specs(inner.get_outputs())
        self.run = _runner(inner)


def _plain_session(path: Path) -> _PlainSession:
    from engines.backends import ort

    return _PlainSession(ort.open_file(path, optimised=False))


def _runner(inner: Any) -> Callable[[parity.Arrays], list[np.ndarray]]:
    def run(feed: parity.Arrays) -> list[np.ndarray]:
        outputs: list[np.ndarray] = inner.run(None, feed)
        return outputs

    return run
