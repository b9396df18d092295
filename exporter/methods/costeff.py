"""COST-EFF: a BERT-like encoder made slender inside its layers, with an exit head after every layer.

Source: COST-EFF (arXiv 2210.15523) and its official code, whose tensor names are kept whatever the host. The residual
stream keeps its width H; heads, neurons and the rank of the word table may differ per layer.
Letters: B batch, S sequence length, H hidden size, L layers, C classes, a heads of w, f neurons, e rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compexport.errors import InputError, describe
from engines.manifest import Cost
from exporter.backbone import Backbone
from exporter.methods.costeff_layers import Attention, Embeddings, Highway, Layer, Pooler, ScaledGradient
from exporter.methods.slender import PRESETS, HostFacts, SlenderShape, rounded_ratio, shape_for_ratio, shape_named
from exporter.methods.slender_weights import (
    factorised,
    official_names,
    reads_mean,
    require_tables,
    shape_of,
    size_of,
    slenderised,
)
from exporter.methods.variator import additive
from exporter.plans.costeff import HIGHWAY
from exporter.precision import wide


class ExitStatistics(NamedTuple):
    """How sure an exit is, [...] each, in fp32 at least: entropy in nats, the top probability, its lead."""

    entropy: Tensor
    max_probability: Tensor
    margin: Tensor


def exit_statistics(logits: Tensor) -> ExitStatistics:
    """Logits [..., C] -> statistics [...]; finite for any finite logits, NaN where a logit is NaN.

    By way of log-probabilities, since a probability that underflows has no logarithm.
    """
    log = torch.log_softmax(wide(logits), dim=-1)
    probabilities = log.exp()
    top = probabilities.topk(2, dim=-1).values
    return ExitStatistics(-(probabilities * log).sum(-1), top[..., 0], top[..., 0] - top[..., 1])


@dataclass
class CosteffOutput:
    """``logits``: one [B,C] per layer, the last final. ``hidden_states``: embeddings, then every layer, [B,S,H]."""

    logits: list[Tensor]
    hidden_states: list[Tensor]


class CosteffModel(nn.Module):
    """A slender multi-exit classifier; ``state_dict`` has the official names.

    Layers are counted from 1 where they are exits and from 0 where they are sliced, as everywhere. ``pooler_dense``:
    the final classifier reads a dense pooler, as the host's own does; ``highway_dense``: so do the exits before it.
    Otherwise a head reads tanh of the first token. ``mean``: heads read the mean of the real tokens beside the first
    one, all but a final one with the host's own pooler; that is ours, for states whose first token says little before
    the last layers. Whether they do shows in the shapes of their tensors.

    While training, the gradients of the L-i predictions above layer i (from 0) reach it as their mean and not as their
    sum, unless ``gradient_equilibrium`` is switched off.
    """

    def __init__(
        self,
        facts: HostFacts,
        shape: SlenderShape,
        num_labels: int,
        *,
        pooler_dense: bool = False,
        highway_dense: bool = False,
        mean: bool = False,
        attention: Attention = "eager",
    ) -> None:
        super().__init__()
        shape.require_fit(facts, "COST-EFF model")
        _require_labels(num_labels, "COST-EFF model")
        self.facts, self.shape, self.num_labels = facts, shape, num_labels
        self.pooler_dense, self.highway_dense, self.mean = pooler_dense, highway_dense, mean
        read = 2 * facts.hidden if mean else facts.hidden
        self.gradient_equilibrium = True
        widths = zip(shape.heads, shape.neurons, strict=True)
        self.bert = nn.ModuleDict(
            {
                "embeddings": Embeddings(facts, shape.embedding),
                "encoder": nn.ModuleDict(
                    {
                        "layer": nn.ModuleList(Layer(facts, heads, neurons, attention) for heads, neurons in widths),
                        "highway": nn.ModuleList(
                            Highway(facts, num_labels, highway_dense, read) for _ in range(facts.layers - 1)
                        ),
                    }
                ),
            }
        )
        if facts.word_width != facts.hidden:
            self.bert["embeddings_project"] = nn.Linear(facts.word_width, facts.hidden)
        if pooler_dense:
            self.bert["pooler"] = Pooler(facts, facts.hidden)
        self.dropout = nn.Dropout(facts.classifier_dropout)
        self.classifier = nn.Linear(facts.hidden if pooler_dense else read, num_labels)
        self.apply(self._initialise)

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.facts.initializer_range)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    # --- making

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        shape: SlenderShape | None = None,
        num_labels: int | None = None,
        *,
        pooler_dense: bool | None = None,
        highway_dense: bool = False,
        mean: bool = False,
        attention: Attention = "eager",
    ) -> CosteffModel:
        """The backbone's weights; exits, and whatever head the backbone lacks, are fresh.

        At full width, the final logits are those of a backbone fine-tuned for classification, bit for bit. A narrower
        ``shape`` keeps the first heads and neurons: only training can say which are worth it. ``pooler_dense`` defaults
        to what the backbone has; a model without a classification head needs ``num_labels`` and has none.
        InputError for architectures and tasks that the method does not fit.
        """
        facts = HostFacts.of(backbone)
        require_task(backbone, num_labels)
        classes = len(backbone.labels) if num_labels is None else num_labels
        tensors = official_names(backbone, classes)
        own = "bert.pooler.dense.weight" in tensors
        dense = own if pooler_dense is None else pooler_dense
        wanted = SlenderShape.full(facts) if shape is None else shape
        wanted.require_fit(facts, f"{backbone.folder}: shape {wanted}")
        kept = slenderised(
            tensors,
            facts.head_width,
            [range(heads) for heads in wanted.heads],
            [range(neurons) for neurons in wanted.neurons],
            wanted.embedding,
        )
        heads = {"pooler_dense": dense, "highway_dense": highway_dense, "mean": mean}
        model = cls(facts, wanted, classes, **heads, attention=attention)
        if own and not dense:  # the backbone's classifier reads what its pooler makes, and nothing else
            kept = {n: t for n, t in kept.items() if not n.startswith(("bert.pooler.", "classifier."))}
        model.load_state_dict({**model.state_dict(), **kept})
        return model.eval()

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], host: HostFacts | Backbone, origin: str, *, attention: Attention = "eager"
    ) -> CosteffModel:
        """Rebuild a model from stored tensors in the official layout; every width is read from their shapes.

        InputError names the first tensor that is missing, left over, or of a shape that does not fit the others.
        """
        facts = HostFacts.of(host)
        shape = shape_of(tensors, facts, origin)
        num_labels = size_of(tensors, "classifier.weight", 0, origin)
        _require_labels(num_labels, origin)
        pooled, mean = "bert.pooler.dense.weight" in tensors, reads_mean(tensors, facts, origin)
        read = 2 * facts.hidden if mean and not pooled else facts.hidden
        require_tables(tensors, facts, shape, [num_labels, read], origin)
        with torch.device("meta"):
            model = cls(
                facts,
                shape,
                num_labels,
                pooler_dense=pooled,
                highway_dense=any(name.startswith(f"{HIGHWAY}0.pooler.") for name in tensors),
                mean=mean,
                attention=attention,
            )
        expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in sorted(expected.keys() | tensors.keys()):
            got = list(tensors[name].shape) if name in tensors else "nothing"
            if got != expected.get(name):
                raise InputError(describe(f"{origin}: {name}", got=got, expected=expected.get(name, "no such tensor")))
        # Copies: training must not write into what the caller, or a file's memory map, holds.
        copies = {name: tensors[name].detach().float().clone().contiguous() for name in expected}
        model.load_state_dict(copies, assign=True)
        return model.requires_grad_(True).eval()

    # --- running

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Ids [B,S] -> [B,S,H]; without types, all tokens are of type 0."""
        h: Tensor = self.bert["embeddings"](input_ids, token_type_ids)
        return self.bert["embeddings_project"](h) if "embeddings_project" in self.bert else h

    def run_layers(self, h: Tensor, attention_mask: Tensor, first: int, last: int) -> Tensor:
        """Layers ``first`` to ``last`` - 1, counted from 0: h [B,S,H], mask [B,S] of 0 and 1 -> [B,S,H]."""
        bias = self._bias(attention_mask, h)
        for index in range(first, last):
            h = self._layers[index](h, bias)
        return h

    def exit_logits(self, h: Tensor, attention_mask: Tensor, layer: int) -> Tensor:
        """The prediction after ``layer``, counted from 1, of which h [B,S,H] is the output: [B,C]; mask [B,S]."""
        if layer == self.facts.layers:
            pooler = self.bert["pooler"] if self.pooler_dense else None
            classifier: nn.Module = self.classifier
        else:
            highway: Any = self.bert["encoder"]["highway"][layer - 1]  # type: ignore[index]
            pooler = highway.pooler if self.highway_dense else None
            classifier = highway.classifier
        host_own = layer == self.facts.layers and self.pooler_dense
        read = torch.cat((h[:, 0], mean_of(h, attention_mask)), dim=-1) if self.mean and not host_own else h[:, 0]
        pooled = torch.tanh(read) if pooler is None else pooler(read)
        out: Tensor = classifier(self.dropout(pooled))
        return out

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> CosteffOutput:
        """All predictions and states; input_ids, attention_mask, token_type_ids: [B,S] integers."""
        h = self.embed(input_ids, token_type_ids)
        bias = self._bias(attention_mask, h)
        logits, states = [], [h]
        layers = self.facts.layers
        balanced = self.training and self.gradient_equilibrium
        for index in range(layers):
            state = self._layers[index](h, bias)
            if balanced:
                state = ScaledGradient.apply(state, 1 / (layers - index))
            states.append(state)
            logits.append(self.exit_logits(state, attention_mask, index + 1))
            h = ScaledGradient.apply(state, max(1, layers - index - 1)) if balanced else state
        return CosteffOutput(logits, states)

    def _bias(self, attention_mask: Tensor, h: Tensor) -> Tensor:
        return additive(attention_mask.to(h.dtype))[:, None, None, :]

    @property
    def _layers(self) -> Any:
        return self.bert["encoder"]["layer"]  # type: ignore[index]

    # --- describing

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @property
    def ratio(self) -> float:
        """Parameters of the host's layers' matrices ÷ those kept."""
        return self.shape.ratio(self.facts)


def mean_of(h: Tensor, attention_mask: Tensor) -> Tensor:
    """The mean [B,H] of h [B,S,H] over the tokens whose mask [B,S] is 1; 0 where a text has none."""
    mask = attention_mask.to(h.dtype).unsqueeze(-1)
    return (h * mask).sum(1) / mask.sum(1).clamp(min=1)


def cost(model: CosteffModel, first: int = 0, last: int | None = None, exits: Iterable[int] | None = None) -> Cost:
    """MACs of one sequence through layers ``first`` to ``last`` - 1 and the heads ``exits``, counted from 1.

    From layer 0 on, the product of the factorised word table (and ELECTRA's projection) is part of it; look-ups count
    0. ``exits`` defaults to the head after the last of these layers.
    """
    facts, shape = model.facts, model.shape
    last = facts.layers if last is None else last
    heads, neurons = sum(shape.heads[first:last]), sum(shape.neurons[first:last])
    per_token = 4 * facts.hidden * facts.head_width * heads + 2 * facts.hidden * neurons
    if first == 0:
        per_token += (shape.embedding or 0) * facts.word_width
        per_token += facts.word_width * facts.hidden if facts.word_width != facts.hidden else 0
    fixed = 0
    for layer in (last,) if exits is None else exits:
        last_one = layer == facts.layers
        dense = model.pooler_dense if last_one else model.highway_dense
        read = 2 * facts.hidden if model.mean and not (last_one and dense) else facts.hidden
        fixed += facts.hidden * (read + model.num_labels) if dense else read * model.num_labels
    return Cost(fixed=fixed, per_token=per_token, per_pair=2 * facts.head_width * heads)


def _require_labels(num_labels: int, origin: str) -> None:
    if num_labels < 2:
        hint = "an exit needs a probability to be sure of"
        raise InputError(describe(f"{origin}: labels", got=num_labels, expected="at least 2", hint=hint))


def require_task(backbone: Backbone, num_labels: int | None = None) -> None:
    """InputError unless the backbone classifies, one label a text, or is to: then its ``num_labels`` are given."""
    start = backbone.task == "feature-extraction" and num_labels is not None
    if backbone.task != "sequence-classification" and not start:
        hint = "fine-tune the model on labels first"
        raise InputError(
            describe(
                f"{backbone.folder}: COST-EFF's exits classify whole texts",
                got=f"a model for {backbone.task}",
                expected="sequence-classification",
                hint=hint,
            )
        )
    # Of a model without its head, the configuration may still say what that was for.
    if not start and getattr(backbone.config, "problem_type", None) in ("multi_label_classification", "regression"):
        raise InputError(
            describe(
                f"{backbone.folder}: COST-EFF's exits need one label per text",
                got=backbone.config.problem_type,
                expected="single_label_classification",
            )
        )


__all__ = [
    "PRESETS",
    "Attention",
    "CosteffModel",
    "CosteffOutput",
    "ExitStatistics",
    "HostFacts",
    "SlenderShape",
    "cost",
    "exit_statistics",
    "factorised",
    "require_task",
    "rounded_ratio",
    "shape_for_ratio",
    "shape_named",
    "slenderised",
]
