"""What is traced of a modular model, each piece once: the graphs of all tilings are joined from these.

A tile's graph is traced with random tensors and given those of any layer or module. Names and axes of what is joined
are those of Hugging Face's optimum. Letters: B batch, n source tokens, t target tokens, p target tokens before, a heads
of width w, H hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from engines.manifest import HIDDEN, PREVIOUS, tile_cache_name
from exporter import passes, trace
from exporter.graphs.costeff_trace import located
from exporter.hosts.tiles import TILE_HOSTS, TileHost, causal_bias, hidden_bias
from exporter.methods.assembly import STACKS, Stack
from exporter.methods.modular import ModularModel
from exporter.plans.modular import Part
from exporter.precision import FLOATING, array_of, wide
from exporter.trace import BATCH, SOURCE, TARGET, TARGET_PAST, TARGET_TOTAL, TracedInput

IDS, MASK = "input_ids", "attention_mask"
SOURCE_MASK, STATES = "encoder_attention_mask", "encoder_hidden_states"
LAST_STATE, LOGITS = "last_hidden_state", "logits"
BIAS, SOURCE_BIAS = "bias", "source_bias"
# One tile's keys and values: of the target, before and after a step, and of the source.
PAST_PAIR, PAIR, SOURCE_PAIR = ("past_key", "past_value"), ("key", "value"), ("source_key", "source_value")

Pair = tuple[Tensor, Tensor]


def cache_names(prefix: str, tiles: int, *, source: bool = True) -> list[str]:
    """Names of a decoder's cache entries, tile by tile: of the target, and of the source unless these are not made."""
    stacks: tuple[Stack, ...] = ("decoder", "encoder") if source else ("decoder",)
    return [
        tile_cache_name(prefix, tile, stack, kind)
        for tile in range(tiles)
        for stack in stacks
        for kind in ("key", "value")
    ]


class Pieces:
    """The pieces of one base and its modules, made at first need; ``store`` may move their tensors out, in place."""

    def __init__(self, model: ModularModel, store: Callable[[onnx.ModelProto], object]) -> None:
        self._modular, self._store = model, store
        self._host = _host(model)
        self._names = _source_names(model)
        self._dtype = next(model.base.parameters()).dtype  # an embedding's, so not that of norms
        self._template = cache(self._traced_tile)
        self.enter = cache(self._enter)
        self.close = cache(self._close)
        self.tile = cache(self._tile)

    def _enter(self, part: Part) -> onnx.ModelProto:
        """What stands before the tiles -> ``hidden``, ``bias`` and, of a decoder, ``source_bias``.

        Of ids [B,n] and mask; of a decoder ids [B,t], the source's mask and, of a cached step, any tile's past keys.
        """
        module = entering(self._modular, part)
        inputs = [TracedInput(IDS, torch.long, (BATCH, SOURCE)), TracedInput(MASK, torch.long, (BATCH, SOURCE))]
        outputs = [HIDDEN, BIAS]
        if part != "encoder":
            mask = TracedInput(SOURCE_MASK, torch.long, (BATCH, SOURCE))
            inputs = [TracedInput(IDS, torch.long, (BATCH, TARGET)), mask]
            outputs.append(SOURCE_BIAS)
        if part == "cached":
            inputs.append(self._pair(PAST_PAIR[0], TARGET_PAST))
        return self._named(trace.onnx_from_inputs(module, inputs, outputs))

    def _close(self, stack: Stack) -> onnx.ModelProto:
        """What follows the tiles: ``previous`` -> the last states, or logits."""
        module = closing(self._modular, stack)
        state = TracedInput(PREVIOUS, self._dtype, (BATCH, SOURCE if stack == "encoder" else TARGET, self._hidden))
        output = LAST_STATE if stack == "encoder" else LOGITS
        return self._named(trace.onnx_from_inputs(module, [state], [output]))

    def _tile(self, part: Part, start: int, size: int) -> onnx.ModelProto:
        """One layer or module: ``previous`` and the biases -> ``hidden``.

        A first step also takes the source's states and makes ``key``, ``value`` of the target, ``source_key`` and
        ``source_value``; a cached one takes these two and ``past_key``, ``past_value``.
        """
        graph, places = self._template(part)
        tile = self._modular.tile(_stack(part), start, size)
        stored = {name: array_of(tensor) for name, tensor in tile.state_dict().items()}
        tensors = {place: _form(stored[name], form) for place, (name, form) in places.items()}
        keys = {name: self._names[id(tensor)] for name, tensor in tile.state_dict(keep_vars=True).items()}
        made = passes.with_tensors(graph, tensors)
        named = {place: keys[name] + _SUFFIX[form] for place, (name, form) in places.items()}
        return self._stored(passes.with_names(made, named))

    def _traced_tile(self, part: Part) -> tuple[onnx.ModelProto, dict[str, tuple[str, str]]]:
        """A trace of random tensors, which are all different, and where they are in it."""
        layer = copy.deepcopy(self._modular.tile(_stack(part), 0, 1)).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(0)
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
        if part == "encoder":
            state = TracedInput(PREVIOUS, self._dtype, (BATCH, SOURCE, self._hidden))
            traced = trace.onnx_from_inputs(tile_of(layer, part, self._host), [state, self._bias(part)], [HIDDEN])
        else:
            traced = self._traced_decoder_tile(part, layer)
        clean = passes.with_kept_axes(passes.with_divisions(traced))
        return clean, located(clean, layer.state_dict())

    def _traced_decoder_tile(self, part: Part, layer: nn.Module) -> onnx.ModelProto:
        state = TracedInput(PREVIOUS, self._dtype, (BATCH, TARGET, self._hidden))
        source = TracedInput(SOURCE_BIAS, self._dtype, (BATCH, 1, 1, SOURCE))
        inputs = [state, self._bias(part), source]
        if part == "first":
            inputs.append(TracedInput(STATES, self._dtype, (BATCH, SOURCE, self._hidden)))
            return trace.onnx_from_inputs(tile_of(layer, part, self._host), inputs, [HIDDEN, *PAIR, *SOURCE_PAIR])
        inputs += [self._pair(name, TARGET_PAST) for name in PAST_PAIR]
        inputs += [self._pair(name, SOURCE) for name in SOURCE_PAIR]
        made = trace.onnx_from_inputs(tile_of(layer, part, self._host), inputs, [HIDDEN, *PAIR])
        return passes.with_axis(made, PAIR, 2, TARGET_TOTAL)

    def _bias(self, part: Part) -> TracedInput:
        relative = self._host.relative is not None
        axes: tuple[str | int, ...]
        if part == "encoder":
            axes = (BATCH, self._heads(part), SOURCE, SOURCE) if relative else (BATCH, 1, 1, SOURCE)
        else:
            axes = (1, self._heads(part) if relative else 1, TARGET, TARGET if part == "first" else TARGET_TOTAL)
        return TracedInput(BIAS, self._dtype, axes)

    def _pair(self, name: str, length: str) -> TracedInput:
        heads = self._heads("cached")
        width = self._modular.facts.decoder.inner // heads
        return TracedInput(name, self._dtype, (BATCH, heads, length, width))

    def _heads(self, part: Part) -> int:
        return self._host.attention(self._modular.tile(_stack(part), 0, 1), False).heads

    @property
    def _hidden(self) -> int:
        return self._modular.facts.encoder.hidden

    def _named(self, graph: onnx.ModelProto) -> onnx.ModelProto:
        """With tensors under the names that they have in the base; what is computed while tracing keeps its own."""
        names = {}
        for tensor in graph.graph.initializer:
            array = numpy_helper.to_array(tensor)
            if array.size > 1 and tensor.data_type in FLOATING and (name := self._name_of(array)) is not None:
                names[tensor.name] = name
        return self._stored(passes.with_names(passes.without_zero_bias(passes.with_divisions(graph)), names))

    def _name_of(self, array: np.ndarray) -> str | None:
        for name, tensor in self._modular.base.state_dict().items():
            for form in ("whole", "transposed"):
                held = array_of(tensor) if form == "whole" else array_of(tensor).T
                if (held.shape, held.dtype) == (array.shape, array.dtype) and np.array_equal(held, array):
                    return name + _SUFFIX[form]
        return None

    def _stored(self, graph: onnx.ModelProto) -> onnx.ModelProto:
        self._store(graph)
        return graph


TRANSPOSED = ".T"  # what the name of a tensor ends in that is stored the other way round, as products want it
_SUFFIX = {"whole": "", "transposed": TRANSPOSED}


def _form(array: np.ndarray, form: str) -> np.ndarray:
    return np.ascontiguousarray(array.T) if form == "transposed" else array


def _source_names(model: ModularModel) -> dict[int, str]:
    """Identity of a tensor -> its name in the base or among the modules."""
    names: dict[int, str] = {}
    for name, tensor in model.base.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), name)
    for name, tensor in model.module_stacks.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), f"modules.{name}")
    return names


def _stack(part: Part) -> Stack:
    return "encoder" if part == "encoder" else "decoder"


class _Enter(nn.Module):
    """What stands before the tiles of one stack."""

    def __init__(self, modular: ModularModel, host: TileHost, stack: Stack) -> None:
        super().__init__()
        self.stack: Any = modular.host.stacks(modular.base)[STACKS.index(stack)]
        self.host = host
        self.buckets = nn.Buffer(host.buckets(self.stack)) if host.buckets is not None else None

    def relative(self, length: int, past: int, bias: Tensor) -> Tensor:
        """``bias`` [B or 1,1,t or 1,p+t], and what relative positions are worth besides."""
        if self.host.relative is None:
            return bias
        assert self.buckets is not None
        return self.host.relative(self.stack, self.buckets, length, past) + bias


class _EnterEncoder(_Enter):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        h = self.host.embed(self.stack, input_ids, 0)
        return h, self.relative(input_ids.shape[1], 0, hidden_bias(attention_mask, h))


class _EnterFirst(_Enter):
    def forward(self, input_ids: Tensor, encoder_attention_mask: Tensor) -> tuple[Tensor, ...]:
        return self._entered(input_ids, encoder_attention_mask, 0)

    def _entered(self, input_ids: Tensor, source_mask: Tensor, past: int) -> tuple[Tensor, ...]:
        h, length = self.host.embed(self.stack, input_ids, past), input_ids.shape[1]
        own = self.relative(length, past, causal_bias(length, past, h)[None, None])
        return h, own, hidden_bias(source_mask, h)


class _EnterCached(_EnterFirst):
    def forward(  # type: ignore[override]
        self, input_ids: Tensor, encoder_attention_mask: Tensor, past_key: Tensor
    ) -> tuple[Tensor, ...]:
        return self._entered(input_ids, encoder_attention_mask, past_key.shape[2])


class _Tile(nn.Module):
    """One layer, or a module in its place."""

    def __init__(self, layer: nn.Module, host: TileHost) -> None:
        super().__init__()
        self.layer, self.host = layer, host

    def look_at_itself(self, h: Tensor, bias: Tensor, past: Pair | None = None) -> tuple[Tensor, Pair]:
        """Of h [B,t,H]: the sublayer's output, and keys and values of all p + t tokens."""
        attention = self.host.attention(self.layer, False)
        x = self.host.enter(attention, h)
        key, value = attention.split(attention.k(x)), attention.split(attention.v(x))
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        return self.host.leave(attention, h, attention.attended(x, key, value, bias)), (key, value)

    def look_at_source(self, h: Tensor, bias: Tensor, source: Pair) -> Tensor:
        """Of h [B,t,H]: the sublayer's output."""
        attention = self.host.attention(self.layer, True)
        x = self.host.enter(attention, h)
        return self.host.leave(attention, h, attention.attended(x, *source, bias))


class _EncoderTile(_Tile):
    def forward(self, previous: Tensor, bias: Tensor) -> Tensor:
        h, _ = self.look_at_itself(previous, bias)
        return self.host.feed_forward(self.layer, h)


class _FirstTile(_Tile):
    def forward(
        self, previous: Tensor, bias: Tensor, source_bias: Tensor, encoder_hidden_states: Tensor
    ) -> tuple[Tensor, ...]:
        h, own = self.look_at_itself(previous, bias)
        attention = self.host.attention(self.layer, True)
        states = encoder_hidden_states
        source = attention.split(attention.k(states)), attention.split(attention.v(states))
        h = self.look_at_source(h, source_bias, source)
        return self.host.feed_forward(self.layer, h), *own, *source


class _CachedTile(_Tile):
    def forward(
        self,
        previous: Tensor,
        bias: Tensor,
        source_bias: Tensor,
        past_key: Tensor,
        past_value: Tensor,
        source_key: Tensor,
        source_value: Tensor,
    ) -> tuple[Tensor, ...]:
        h, own = self.look_at_itself(previous, bias, (past_key, past_value))
        h = self.look_at_source(h, source_bias, (source_key, source_value))
        return self.host.feed_forward(self.layer, h), *own


class _Close(nn.Module):
    """What follows the tiles of one stack."""

    def __init__(self, modular: ModularModel, host: TileHost, stack: Stack) -> None:
        super().__init__()
        self.model = modular.base
        self.stack: Any = modular.host.stacks(modular.base)[STACKS.index(stack)]
        self.host = host


class _CloseEncoder(_Close):
    def forward(self, previous: Tensor) -> Tensor:
        return self.host.close(self.stack, previous)


class _CloseDecoder(_Close):
    def forward(self, previous: Tensor) -> Tensor:
        h, weight, bias = self.host.head(self.model, self.host.close(self.stack, previous))
        # As two axes, with a bias: so the matrix is stored as embeddings look it up, and once where they are tied.
        none = torch.zeros(weight.shape[0], dtype=h.dtype)
        logits = nn.functional.linear(h.flatten(0, 1), weight, none if bias is None else bias)
        return wide(logits.unflatten(0, h.shape[:2]))


def entering(modular: ModularModel, part: Part) -> nn.Module:
    """What stands before the tiles; arguments and results as of ``Pieces.enter``."""
    kinds = {"encoder": _EnterEncoder, "first": _EnterFirst, "cached": _EnterCached}
    return kinds[part](modular, _host(modular), _stack(part)).eval()


def tile_of(layer: nn.Module, part: Part, host: TileHost) -> nn.Module:
    """One layer or module; arguments and results as of ``Pieces.tile``."""
    kinds = {"encoder": _EncoderTile, "first": _FirstTile, "cached": _CachedTile}
    return kinds[part](layer, host).eval()


def closing(modular: ModularModel, stack: Stack) -> nn.Module:
    """What follows the tiles; its argument and result as of ``Pieces.close``."""
    kind = _CloseEncoder if stack == "encoder" else _CloseDecoder
    return kind(modular, _host(modular), stack).eval()


def _host(modular: ModularModel) -> TileHost:
    return TILE_HOSTS[modular.base.config.model_type]
