"""Models that share layers, run as a neural ODE: fewer iterations, larger steps, one set of weights for all.

Source: the idea of "Parameter-shared PLMs as a neural ODE" (arXiv 2310.12818); the formulas are our reconstruction
(docs/ode.md). With F one iteration of a group of layers, a step of size dt is, in the block form,
``(1 - dt) h + dt F(h)``, and in the sublayer form F itself with what each sublayer adds multiplied by dt.
Letters: B batch, S sequence length, T tokens seen so far and now, H hidden size, a heads of w, N iterations, n steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compexport.errors import InputError, describe
from engines.manifest import Cost
from exporter.backbone import Backbone
from exporter.hosts import HOSTS, Host
from exporter.methods.ode_stepping import (
    DEFAULT_FORM,
    FORMS,
    Form,
    OdeFacts,
    Stepping,
    ratios_that_work,
    stepping_for_ratio,
    warnings_of,
)
from exporter.methods.variator import additive, output_names, task_outputs
from exporter.precision import lowest, wide
from exporter.sharing import CONVERTIBLE

Pair = tuple[Tensor, Tensor]


class StepCache:
    """Keys and values [B,a,T,w] of one step's attention; ``update`` is what the host's own attention calls.

    Unlike the host's cache, which has an entry per layer, this is one of n: a shared layer has seen other states in
    every step.
    """

    def __init__(self, past: Pair | None = None) -> None:
        self.pair = past

    def update(self, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Pair:
        """Append keys and values [B,a,S,w]; all there are."""
        if self.pair is None:  # laid out as they will be with a past, so that sums are added up in one order
            self.pair = key.contiguous(), value.contiguous()
        else:
            self.pair = torch.cat((self.pair[0], key), dim=2), torch.cat((self.pair[1], value), dim=2)
        return self.pair


@dataclass(frozen=True)
class SteppedCache:
    """What a decoder has seen so far: per step a pair of keys and values [B,a,T,w]. It fits ``stepping`` alone."""

    stepping: Stepping
    pairs: tuple[Pair, ...]

    @property
    def length(self) -> int:
        """Tokens seen so far."""
        return int(self.pairs[0][0].shape[2])

    def require(self, stepping: Stepping) -> None:
        """InputError unless these keys are of the states that ``stepping`` has."""
        if not self.stepping.same(stepping):
            raise InputError(
                describe(
                    "a cache of other steps",
                    got=f"{self.stepping.n} steps, {self.stepping.form} form, {self.stepping.lists()}",
                    expected=f"{stepping.n} steps, {stepping.form} form, {stepping.lists()}",
                    hint="n is fixed for a whole generation; start it anew",
                )
            )


class SteppedStates(NamedTuple):
    """``last_hidden_state`` [B,S,H] is what heads read, after the host's final norm if it has one.

    ``hidden_states``: what the first step reads, then every step's result, if asked for. ``cache``: decoders only, if
    asked for.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    cache: SteppedCache | None


class SteppedEncoder(nn.Module):
    """The stack of a Hugging Face model that shares layers, run in steps. Its modules are the model's own.

    ``model`` may be of any class of a host with sharing, with or without a head. InputError if it shares nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        config: Any = model.config
        self.host = shared_host(config)
        self.base = self.host.encoder(model)
        assert self.host.sharing is not None
        repeated = self.host.sharing.groups(self.base, config)
        groups = tuple(one.iterations for one in repeated)
        if self.host.sharing.stated(config) is None and len(groups) == sum(groups) > 1:
            raise InputError(_nothing_shared(type(model).__name__, f"{len(groups)} different layers"))
        self.facts = _facts(config, groups, len(repeated[0].layers), self.host.sharing.causal)
        # Beside ``base``, which registers them: a module listed twice would be stored twice.
        self._groups = tuple(one.layers for one in repeated)

    # --- one by one

    def embed(
        self, input_ids: Tensor, token_type_ids: Tensor | None = None, position_ids: Tensor | None = None
    ) -> Tensor:
        """Ids [B,S] -> what the first step reads, [B,S,H]. Positions count from 0 where none are given."""
        assert self.host.sharing is not None
        return self.host.sharing.embed(self.base, input_ids, token_type_ids, position_ids)

    def attention_bias(self, attention_mask: Tensor, h: Tensor) -> Tensor:
        """Mask [B,T] of 0 and 1 -> additive, in the dtype of h [B,S,H]: [B,1,1,T], or [B,1,S,T] where causal.

        Of a decoder the last S of the T tokens are those of h.
        """
        if not self.facts.causal:
            return additive(attention_mask.to(h.dtype))[:, None, None, :]
        total, queries = attention_mask.shape[1], h.shape[1]
        place = torch.arange(total, device=h.device)
        seen = place[None, :] <= place[total - queries :, None]
        allowed = seen[None, None] & (attention_mask != 0)[:, None, None, :]
        return torch.where(allowed, *(h.new_full((), value) for value in (0.0, lowest(h.dtype))))

    def step(
        self,
        h: Tensor,
        bias: Tensor,
        group: int,
        dt: float | Tensor,
        form: Form = DEFAULT_FORM,
        cache: StepCache | None = None,
    ) -> Tensor:
        """One step of size ``dt`` in ``group``: h [B,S,H] with the bias of :meth:`attention_bias` -> [B,S,H].

        A ``dt`` of exactly 1, as a number, is F alone, without a product; as a tensor of one element it is any size.
        """
        if form == "block":
            return _combined(h, self._iteration(h, bias, group, 1.0, cache), dt)
        return self._iteration(h, bias, group, dt, cache)

    def _iteration(
        self, h: Tensor, bias: Tensor, group: int, dt: float | Tensor, cache: StepCache | None = None
    ) -> Tensor:
        """F, all layers of one iteration, with both sublayers of each multiplied by ``dt``."""
        host, sharing = self.host, self.host.sharing
        assert sharing is not None
        for layer in self._groups[group]:
            h = sharing.settle(layer, h + _scaled(sharing.attended(layer, h, bias, cache), dt))
            h = host.finish(layer, h + _scaled(host.feed_forward(layer, host.enter(layer, h)), dt))
        return h

    def close(self, h: Tensor) -> Tensor:
        """The final norm of hosts that have one, [B,S,H]."""
        return self.host.close(self.base, h)

    # --- all together

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        stepping: Stepping | None = None,
        past: SteppedCache | None = None,
        keep_states: bool = False,
        keep_cache: bool = False,
    ) -> SteppedStates:
        """Ids, types and positions [B,S] integers, mask [B,T] with T = S + what ``past`` holds.

        ``stepping`` defaults to steps of 1, the model itself. InputError if it does not fit the model, or for a past of
        other steps.
        """
        stepping = Stepping.full(self.facts.groups) if stepping is None else stepping
        stepping.require_fit(self.facts.groups)
        if past is not None:
            past.require(stepping)
        if self.facts.causal and position_ids is None:
            position_ids = _positions(attention_mask, input_ids)
        h = self.embed(input_ids, token_type_ids, position_ids)
        bias = self.attention_bias(attention_mask, h)
        states, made = [h], []
        for index, (group, dt) in enumerate(stepping):
            cache = StepCache(past.pairs[index] if past else None) if past or keep_cache else None
            h = self.step(h, bias, group, dt, stepping.form, cache)
            states.append(h)
            if cache is not None and cache.pair is not None:
                made.append(cache.pair)
        kept = SteppedCache(stepping, tuple(made)) if made else None
        return SteppedStates(self.close(h), tuple(states) if keep_states else (), kept)


class SteppedModel(nn.Module):
    """The stack of a backbone and its task's head. Outputs in the order of :func:`output_names`.

    ``stepping``: what ``forward`` takes where it is not told; steps of 1 by default, the backbone itself.
    """

    def __init__(self, backbone: Backbone, stepping: Stepping | None = None) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = SteppedEncoder(backbone.model)
        self.model = backbone.model
        self.stepping = Stepping.full(self.facts.groups) if stepping is None else stepping
        self.stepping.require_fit(self.facts.groups, str(backbone.folder))

    @property
    def facts(self) -> OdeFacts:
        return self.encoder.facts

    def head(self, h: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        """The last step's result [B,S,H] -> the task's outputs, through the host's final norm if it has one."""
        return task_outputs(self.backbone, self.encoder.close(h), attention_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """input_ids, attention_mask, token_type_ids, position_ids: [B,S] integers -> the task's outputs."""
        found = self.encoder(input_ids, attention_mask, token_type_ids, position_ids, stepping=self.stepping)
        return task_outputs(self.backbone, found.last_hidden_state, attention_mask)

    def decode(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        past: SteppedCache | None = None,
    ) -> tuple[Tensor, SteppedCache]:
        """A decoder's logits [B,S,V] for the tokens after ``past``, and the cache that holds these too.

        attention_mask [B,T], T = S + the length of ``past``; its length may be 0.
        """
        found = self.encoder(
            input_ids, attention_mask, None, position_ids, stepping=self.stepping, past=past, keep_cache=True
        )
        (logits,) = task_outputs(self.backbone, found.last_hidden_state, attention_mask)
        return logits, found.cache


def _scaled(update: Tensor, dt: float | Tensor) -> Tensor:
    """dt * update, in fp32 at least; at dt = 1 the update itself, without a product."""
    return update if _is_one(dt) else (dt * wide(update)).to(update.dtype)


def _combined(h: Tensor, iterated: Tensor, dt: float | Tensor) -> Tensor:
    """(1 - dt) h + dt F(h), in fp32 at least: the terms cancel for dt > 1. At dt = 1 F(h) alone.

    Written as ``h + dt (F(h) - h)`` it would not be exact at 1.
    """
    return iterated if _is_one(dt) else ((1 - dt) * wide(h) + dt * wide(iterated)).to(h.dtype)


def _is_one(dt: float | Tensor) -> bool:
    return not isinstance(dt, Tensor) and dt == 1


def _positions(attention_mask: Tensor, input_ids: Tensor) -> Tensor:
    """[1,S]: the last S of T places, counted from 0."""
    total, length = attention_mask.shape[1], input_ids.shape[1]
    return torch.arange(total, device=input_ids.device)[None, total - length :]


# --- what a model is -------------------------------------------------------------------------------------------------


def shared_host(config: Any) -> Host:
    """The host of a configuration whose layers can be steps; InputError names those there are."""
    kind = str(config.model_type)
    host = HOSTS.get(kind)
    if host is None or host.sharing is None:
        known = ", ".join(name for name, one in HOSTS.items() if one.sharing is not None)
        made = "make a model that shares layers of it with `compexport train ode MODEL --share 1 --data D -o OUT`"
        hint = made if kind in CONVERTIBLE else ""
        raise InputError(describe("ode does not fit this architecture", got=repr(kind), expected=known, hint=hint))
    return host


def facts_of(host: OdeFacts | Backbone | nn.Module | Any) -> OdeFacts:
    """Facts of a backbone, a Hugging Face model, or a configuration that says how layers are shared.

    InputError for architectures that do not fit, and for models that share nothing.
    """
    if isinstance(host, OdeFacts):
        return host
    if isinstance(host, Backbone):
        return SteppedEncoder(host.model).facts
    if isinstance(host, nn.Module):
        return SteppedEncoder(host).facts
    sharing = shared_host(host).sharing
    assert sharing is not None
    groups = sharing.stated(host)
    if groups is None:
        raise InputError(_nothing_shared("config.json", f"{host.num_hidden_layers} layers, and not which are the same"))
    return _facts(host, groups, sharing.inner(host), sharing.causal)


def _facts(config: Any, groups: tuple[int, ...], inner: int, causal: bool) -> OdeFacts:
    hidden = int(config.hidden_size)
    neurons = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden
    return OdeFacts(
        groups=groups,
        inner=inner,
        hidden=hidden,
        heads=int(config.num_attention_heads),
        neurons=int(neurons),
        word_width=int(getattr(config, "embedding_size", hidden)),
        vocabulary=int(config.vocab_size),
        positions=int(config.max_position_embeddings),
        types=int(getattr(config, "type_vocab_size", 0)),
        causal=causal,
    )


def _nothing_shared(origin: str, got: str) -> str:
    hint = "make it share its layers with `compexport train ode MODEL --share 1 --data D -o OUT`"
    return describe(f"{origin}: shares no layers", got=got, expected="layers in a row that are the same", hint=hint)


def cost(backbone: Backbone, stepping: Stepping) -> Cost:
    """MACs of one sequence: n iterations, and what is outside of them once. Embedding look-ups count 0.

    Attention is counted over all pairs of tokens, also where the mask is causal: that is what a graph computes.
    """
    return together(embedding_cost(backbone), steps_cost(facts_of(backbone), stepping.n), head_cost(backbone))


def steps_cost(facts: OdeFacts, n: int) -> Cost:
    """MACs of ``n`` steps of whatever size."""
    runs = n * facts.inner
    per_token = 4 * facts.hidden * facts.hidden + 2 * facts.hidden * facts.neurons
    return Cost(per_token=runs * per_token, per_pair=runs * 2 * facts.hidden)


def embedding_cost(backbone: Backbone) -> Cost:
    """MACs before the first step: ALBERT's projection of the embeddings."""
    facts = facts_of(backbone)
    return Cost(per_token=facts.word_width * facts.hidden if backbone.config.model_type == "albert" else 0)


def head_cost(backbone: Backbone) -> Cost:
    """MACs of the task's head."""
    facts = facts_of(backbone)
    if backbone.task == "sequence-classification":
        return Cost(fixed=facts.hidden * (facts.hidden + len(backbone.labels)))
    per_token = {
        "feature-extraction": 0,
        "token-classification": facts.hidden * len(backbone.labels),
        "question-answering": 2 * facts.hidden,
        "text-generation": facts.hidden * facts.vocabulary,
    }
    return Cost(per_token=per_token[backbone.task])


def together(*costs: Cost) -> Cost:
    """The sum of costs without groups of tokens."""
    names = ("fixed", "per_token", "per_pair")
    return Cost(**{name: sum(getattr(one, name) for one in costs) for name in names})


__all__ = [
    "DEFAULT_FORM",
    "FORMS",
    "Form",
    "OdeFacts",
    "Pair",
    "StepCache",
    "SteppedCache",
    "SteppedEncoder",
    "SteppedModel",
    "SteppedStates",
    "Stepping",
    "cost",
    "embedding_cost",
    "facts_of",
    "head_cost",
    "output_names",
    "ratios_that_work",
    "shared_host",
    "stepping_for_ratio",
    "steps_cost",
    "together",
    "warnings_of",
]
