"""Encoder-decoder architectures whose layers can be exchanged: T5 (v1.0, v1.1), BART and mBART.

Unlike :class:`exporter.hosts.host.Host`, which names the parts of a layer, this names the whole layers of both stacks:
what is made of them is again a model of the same transformers class, with fewer layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from exporter.hosts import t5
from exporter.precision import Shrink


@dataclass(frozen=True)
class Seq2SeqHost:
    """The parts of one architecture. ``stacks(model)``: its encoder and decoder, in this order.

    ``layers``: the name of a stack's list of layers. ``attentions(layer)``: a layer's attention modules, which address
    the cache by their ``layer_idx``. ``take_in(stack, tile)`` gives the first tile what belongs to the stack and the
    architecture keeps in its first layer, without a copy of its tensors; ``leave_out(layer)`` removes that from a
    layer. ``resize(model, encoder, decoder)`` writes the numbers of layers into the configurations. ``inner(config)``:
    width of all heads together; ``feed_forward(config, stack)``: products of one token in the feed-forward network of
    stack 0 or 1. ``shrink``: as of :class:`exporter.hosts.host.Host`.
    """

    class_name: str
    stacks: Callable[[Any], tuple[Any, Any]]
    layers: str
    attentions: Callable[[Any], list[Any]]
    take_in: Callable[[Any, Any], None]
    leave_out: Callable[[Any], None]
    resize: Callable[[Any, int, int], None]
    inner: Callable[[Any], int]
    feed_forward: Callable[[Any, int], int]
    shrink: Shrink | None = None

    def layers_of(self, stack: Any) -> nn.ModuleList:
        """The layers of an encoder or a decoder."""
        found: nn.ModuleList = getattr(stack, self.layers)
        return found


# --- T5: the table of relative positions belongs to the stack, and block 0 keeps it for all ---------------------------


def _t5_attentions(layer: Any) -> list[Any]:
    names = ("SelfAttention", "EncDecAttention")
    return [getattr(sublayer, name) for sublayer in layer.layer for name in names if hasattr(sublayer, name)]


def _t5_take_in(stack: Any, tile: Any) -> None:
    attention = tile.layer[0].SelfAttention
    table = stack.block[0].layer[0].SelfAttention.relative_attention_bias
    attention.relative_attention_bias = copy.deepcopy(table, {id(table.weight): table.weight})
    attention.has_relative_attention_bias = True


def _t5_leave_out(layer: Any) -> None:
    attention = layer.layer[0].SelfAttention
    if attention.has_relative_attention_bias:
        del attention.relative_attention_bias
        attention.has_relative_attention_bias = False


def _t5_resize(model: Any, encoder: int, decoder: int) -> None:
    model.config.num_layers, model.config.num_decoder_layers = encoder, decoder
    for stack, layers in ((model.encoder, encoder), (model.decoder, decoder)):
        stack.config.num_layers, stack.config.num_decoder_layers = layers, decoder


def _t5_feed_forward(config: Any, stack: int) -> int:
    return int((3 if config.is_gated_act else 2) * config.d_model * config.d_ff)


# --- BART and mBART: a stack's own parts are all outside its layers ---------------------------------------------------


def _bart_resize(model: Any, encoder: int, decoder: int) -> None:
    model.config.encoder_layers, model.config.decoder_layers = encoder, decoder


def _bart_attentions(layer: Any) -> list[Any]:
    return [getattr(layer, name) for name in ("self_attn", "encoder_attn") if hasattr(layer, name)]


def _bart_like(class_name: str) -> Seq2SeqHost:
    return Seq2SeqHost(
        class_name=class_name,
        stacks=lambda model: (model.model.encoder, model.model.decoder),
        layers="layers",
        attentions=_bart_attentions,
        take_in=lambda stack, tile: None,
        leave_out=lambda layer: None,
        resize=_bart_resize,
        inner=lambda config: int(config.d_model),
        feed_forward=lambda config, stack: int(
            2 * config.d_model * (config.decoder_ffn_dim if stack else config.encoder_ffn_dim)
        ),
    )


SEQ2SEQ_HOSTS: dict[str, Seq2SeqHost] = {
    "t5": Seq2SeqHost(
        class_name="T5ForConditionalGeneration",
        stacks=lambda model: (model.encoder, model.decoder),
        layers="block",
        attentions=_t5_attentions,
        take_in=_t5_take_in,
        leave_out=_t5_leave_out,
        resize=_t5_resize,
        inner=lambda config: int(config.num_heads * config.d_kv),
        feed_forward=_t5_feed_forward,
        shrink=t5.shrink,
    ),
    "bart": _bart_like("BartForConditionalGeneration"),
    "mbart": _bart_like("MBartForConditionalGeneration"),
}
