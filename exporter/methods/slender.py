"""Widths of COST-EFF's slender models: what a host offers, what is kept of it, and the names of both.

Source: COST-EFF (arXiv 2210.15523) and its official code, whose sizes are those of BERT-base; scaling them to other
hosts is ours. Letters: L layers, H hidden size, a heads, w width of one head, f neurons of a feed-forward network,
e rank of the word table.
"""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from typing import Any

from compexport.errors import InputError, describe
from exporter.backbone import Backbone
from exporter.checkpoint import plain_ratio
from exporter.hosts import HOSTS as ALL_HOSTS

# Model types with a post-norm encoder of separate query, key and value matrices.
HOSTS = ("bert", "roberta", "electra", "distilbert")
_POOLER_ACTIVATIONS = {"bert": "tanh", "roberta": "tanh", "electra": "gelu", "distilbert": "relu"}
# Neurons are kept in such steps where there are many: thin products of odd widths waste vector lanes.
_NEURON_STEP, _NEURON_STEP_FROM = 8, 64


@dataclass(frozen=True)
class HostFacts:
    """What a host's configuration says, and no tensor: sizes at full width and conventions of its arithmetic.

    ``position_start``: None where position 0 is the first token's, otherwise the pad id from which RoBERTa counts on.
    ``word_width`` differs from ``hidden`` where the embeddings are projected (ELECTRA-small).
    """

    layers: int
    hidden: int
    heads: int
    neurons: int
    word_width: int
    vocabulary: int
    positions: int
    types: int
    norm_epsilon: float = 1e-12
    activation: str = "gelu"
    pooler_activation: str = "tanh"
    position_start: int | None = None
    dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    initializer_range: float = 0.02

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @classmethod
    def of(cls, host: HostFacts | Backbone | Any) -> HostFacts:
        """Of a backbone or a transformers config; InputError if the architecture is none that the method fits."""
        if isinstance(host, HostFacts):
            return host
        config = host.config if isinstance(host, Backbone) else host
        kind = str(config.model_type)
        _require_host(config, kind)
        distil = kind == "distilbert"
        dropout = float(config.dropout if distil else config.hidden_dropout_prob)
        classifier = config.seq_classif_dropout if distil else getattr(config, "classifier_dropout", None)
        return cls(
            layers=int(config.num_hidden_layers),
            hidden=int(config.hidden_size),
            heads=int(config.num_attention_heads),
            neurons=int(config.hidden_dim if distil else config.intermediate_size),
            word_width=int(config.embedding_size if kind == "electra" else config.hidden_size),
            vocabulary=int(config.vocab_size),
            positions=int(config.max_position_embeddings),
            types=0 if distil else int(config.type_vocab_size),
            norm_epsilon=1e-12 if distil else float(config.layer_norm_eps),
            activation=str(config.activation if distil else config.hidden_act),
            pooler_activation=_POOLER_ACTIVATIONS[kind],
            position_start=int(config.pad_token_id) if kind == "roberta" else None,
            dropout=dropout,
            attention_dropout=float(config.attention_dropout if distil else config.attention_probs_dropout_prob),
            classifier_dropout=dropout if classifier is None else float(classifier),
            initializer_range=float(config.initializer_range),
        )


def _require_host(config: Any, kind: str) -> None:
    if kind not in HOSTS:
        shares = kind in ALL_HOSTS and ALL_HOSTS[kind].sharing is not None
        instead = "build models that share their layers with --method ode" if shares else "use --method variator here"
        raise InputError(
            describe(
                "COST-EFF does not fit this architecture",
                got=repr(kind),
                expected=f"one of {', '.join(HOSTS)}",
                hint=f"it slenderises post-norm encoders; {instead}",
            )
        )
    position = getattr(config, "position_embedding_type", None)
    if position not in (None, "absolute"):
        raise InputError(describe("COST-EFF does not fit these positions", got=position, expected="absolute"))


@dataclass(frozen=True)
class SlenderShape:
    """The widths of a slender model, one entry per layer; ``embedding``: rank of the word table, None if whole."""

    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    embedding: int | None = None

    @property
    def layers(self) -> int:
        return len(self.heads)

    @classmethod
    def full(cls, host: HostFacts | Backbone | Any) -> SlenderShape:
        """Nothing taken away."""
        facts = HostFacts.of(host)
        return cls.uniform(facts.layers, facts.heads, facts.neurons, None)

    @classmethod
    def uniform(cls, layers: int, heads: int, neurons: int, embedding: int | None = None) -> SlenderShape:
        """The same widths in every layer, as in the paper."""
        return cls((heads,) * layers, (neurons,) * layers, embedding)

    @classmethod
    def from_document(cls, document: Any, origin: str) -> SlenderShape:
        """From what :meth:`document` made; InputError names ``origin`` otherwise."""
        try:
            heads, neurons = (tuple(map(_positive, document[key])) for key in ("heads", "neurons"))
            embedding = None if document["embedding"] is None else _positive(document["embedding"])
            if not heads or len(heads) != len(neurons):
                raise ValueError("one entry per layer")
        except (TypeError, KeyError, ValueError) as error:
            expected = '{"heads": [one per layer], "neurons": [one per layer], "embedding": number or null}'
            raise InputError(describe(f"{origin}: no widths", got=document, expected=expected)) from error
        return cls(heads, neurons, embedding)

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        made = asdict(self)
        return {**made, "heads": list(self.heads), "neurons": list(self.neurons)}

    def ratio(self, host: HostFacts | Backbone | Any) -> float:
        """Parameters of the host's attention and feed-forward matrices ÷ those kept; biases and norms not counted."""
        facts = HostFacts.of(host)
        return _matrices(facts, SlenderShape.full(facts)) / _matrices(facts, self)

    def require_fit(self, host: HostFacts | Backbone | Any, origin: str) -> None:
        """InputError where the widths are none of this host's: other depth, nothing kept, or more than there is."""
        facts = HostFacts.of(host)
        if not self.layers == len(self.neurons) == facts.layers:
            raise InputError(describe(f"{origin}: layers", got=self.layers, expected=facts.layers))
        rank = facts.word_width if self.embedding is None else self.embedding
        sizes = (("heads", self.heads, facts.heads), ("neurons", self.neurons, facts.neurons))
        for name, got, most in (*sizes, ("rank of the word table", (rank,), facts.word_width)):
            if not all(1 <= size <= most for size in got):
                wrong = next(size for size in got if not 1 <= size <= most)
                raise InputError(describe(f"{origin}: {name}", got=wrong, expected=f"1 to {most}"))

    def __str__(self) -> str:
        heads, neurons = (str(x[0]) if len(set(x)) == 1 else f"{min(x)}-{max(x)}" for x in (self.heads, self.neurons))
        rank = "" if self.embedding is None else f"_e{self.embedding}"
        return f"a{heads}_l{self.layers}_f{neurons}{rank}"


def _positive(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{value} is no size")
    return int(value)


def _matrices(facts: HostFacts, shape: SlenderShape) -> int:
    return sum(
        4 * facts.hidden * heads * facts.head_width + 2 * facts.hidden * neurons
        for heads, neurons in zip(shape.heads, shape.neurons, strict=True)
    )


# --- from a ratio or a name to widths --------------------------------------------------------------------------------


def shape_for_ratio(host: HostFacts | Backbone | Any, ratio: float) -> SlenderShape:
    """Widths that keep 1/``ratio`` of the layers' matrices, as nearly as they can.

    Heads are kept in that share (at least one), neurons fill up the rest; e is in proportion to the heads, as in the
    paper's sizes. InputError if one head a layer is already too much.
    """
    facts = HostFacts.of(host)
    if not (math.isfinite(ratio) and ratio >= 1):
        raise InputError(describe("ratio", got=ratio, expected="a number of at least 1"))
    if ratio == 1:
        return SlenderShape.full(facts)
    most = _matrices(facts, SlenderShape.full(facts)) / _matrices(facts, SlenderShape.uniform(facts.layers, 1, 1))
    if ratio > most:
        hint = "one head and one neuron a layer would be left"
        raise InputError(describe("ratio", got=f"{ratio:g}", expected=f"at most {most:.3g} for this model", hint=hint))
    heads = max(1, _nearest(facts.heads / ratio))
    room = _neurons_beside(facts, heads, ratio)
    while heads > 1 and room < 1:
        heads -= 1
        room = _neurons_beside(facts, heads, ratio)
    step = _NEURON_STEP if room >= _NEURON_STEP_FROM else 1
    neurons = min(facts.neurons, max(1, step * _nearest(room / step)))
    return SlenderShape.uniform(facts.layers, heads, neurons, _rank(facts, heads))


def rounded_ratio(shape: SlenderShape, host: HostFacts | Backbone | Any, origin: str) -> float:
    """The ratio by which a shape is known; InputError for one so wide that it would take the full width's place."""
    facts = HostFacts.of(host)
    ratio = plain_ratio(max(1.0, round(shape.ratio(facts), 2)))
    if ratio == 1 and shape != SlenderShape.full(facts):
        expected = f"fewer heads or neurons than {SlenderShape.full(facts)}"
        hint = "only the layers' matrices count, not the word table"
        raise InputError(
            describe(f"{origin}: ratio 1, which is the full width", got=shape, expected=expected, hint=hint)
        )
    return ratio


def _neurons_beside(facts: HostFacts, heads: int, ratio: float) -> float:
    """The neurons of a layer with ``heads`` that keeps 1/``ratio`` of the dense layer's matrices."""
    attention = 4 * facts.hidden * facts.head_width
    dense = attention * facts.heads + 2 * facts.hidden * facts.neurons
    return (dense / ratio - attention * heads) / (2 * facts.hidden)


def _rank(facts: HostFacts, heads: int) -> int:
    return max(1, _nearest(facts.word_width * heads / facts.heads))


def _nearest(number: float) -> int:
    return math.floor(number + 0.5)


@dataclass(frozen=True)
class Preset:
    """A size of the paper, for BERT-base: 12 heads, 3072 neurons, hidden size 768."""

    heads: int
    neurons: int
    embedding: int

    def on(self, host: HostFacts | Backbone | Any) -> SlenderShape:
        """The same shares of another host."""
        facts = HostFacts.of(host)
        heads = max(1, _nearest(self.heads * facts.heads / 12))
        neurons = max(1, _nearest(self.neurons * facts.neurons / 3072))
        rank = max(1, _nearest(self.embedding * facts.word_width / 768))
        return SlenderShape.uniform(facts.layers, heads, neurons, rank)


PRESETS = {
    "a6": Preset(6, 1536, 384),
    "a4": Preset(4, 1024, 256),
    "a2": Preset(2, 512, 128),
    "a6-half": Preset(6, 768, 384),
    "a4-half": Preset(4, 512, 256),
    "a2-half": Preset(2, 256, 128),
}
_FULL_NAME = re.compile(r"a(\d+)_l(\d+)_f(\d+)(?:_e(-1|\d+))?")


def shape_named(host: HostFacts | Backbone | Any, name: str) -> SlenderShape:
    """A preset, scaled to the host, or exact sizes such as ``a2_l12_f256_e128``; InputError lists the presets."""
    facts = HostFacts.of(host)
    if name in PRESETS:
        return PRESETS[name].on(facts)
    match = _FULL_NAME.fullmatch(name)
    if match is None:
        expected = f"one of {', '.join(PRESETS)}, or sizes such as a2_l{facts.layers}_f256_e128"
        raise InputError(describe("unknown preset", got=repr(name), expected=expected))
    heads, layers, neurons = (int(match[i]) for i in (1, 2, 3))
    rank = None if match[4] in (None, "-1") else int(match[4])
    shape = SlenderShape.uniform(layers, heads, neurons, rank)
    shape.require_fit(facts, f"preset {name}")
    return shape
