"""T5 as ModelCenter stores it, turned into Hugging Face's T5 (the original one: ReLU, tied embedding).

ModelCenter keeps the whole residual stream at 1/100 of Hugging Face's scale, so that fp16 does not overflow. What
writes into the stream therefore grows by 100 (embedding, attention output; the two feed-forward matrices by 10 each,
which is the same because ReLU commutes with positive factors), and the epsilon of the norms by 100 squared.
Source: ModelCenter's T5 and the official Variator code. Letters: H hidden size, F feed-forward width, V vocabulary,
E heads x head width, r LoRA rank; weights are [out, in].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compexport.errors import InputError, describe
from exporter.importers.tensors import Shape, promoted, require_shapes

SCALE = 100
# The norms of the official T5 have 1e-6, on a stream of 1/100 of the scale.
EPSILON_THERE, EPSILON_HERE = 1e-6, 1e-2

LORA_RANK, LORA_ALPHA = 16, 32
_LORA = {  # list of low-rank updates -> stack and projection of its self-attention that they add to
    "project_q_lora": ("encoder", "project_q"),
    "project_v_lora": ("encoder", "project_v"),
    "project_q_lora_dec": ("decoder", "project_q"),
    "project_v_lora_dec": ("decoder", "project_v"),
}


@dataclass(frozen=True)
class _Place:
    """Where one ModelCenter tensor goes, its shape, and the factor that brings it to Hugging Face's scale."""

    target: str
    shape: Shape
    factor: int = 1


def require_original_t5(config: Any, folder: Path) -> None:
    """InputError unless ``config`` is that of a T5 with ReLU, tied embedding, and an epsilon known to be right."""
    if config.model_type != "t5":
        raise InputError(
            describe(f"{folder}: official plugins are for T5", got=repr(config.model_type), expected="a T5 folder")
        )
    if config.feed_forward_proj != "relu" or not config.scale_decoder_outputs:
        kind = config.feed_forward_proj if config.feed_forward_proj != "relu" else "an untied embedding"
        raise InputError(describe(f"{folder}: not the original T5", got=kind, expected="relu and a tied embedding"))
    if config.layer_norm_epsilon not in (EPSILON_THERE, EPSILON_HERE):
        raise InputError(
            describe(
                f"{folder}: layer_norm_epsilon",
                got=config.layer_norm_epsilon,
                expected=f"{EPSILON_THERE}, as the official T5 has, or {EPSILON_HERE} after an import",
            )
        )


def t5_from_modelcenter(tensors: Mapping[str, Tensor], config: Any, origin: Path) -> dict[str, Tensor]:
    """Hugging Face's state dict of ``T5ForConditionalGeneration``, the tied embedding once, LoRA merged.

    ``tensors``: ModelCenter's names under ``t5.``, and either none or all of the LoRA tensors. Every one is used;
    InputError names one that is missing, left over, or of a shape that ``config`` does not give. fp16 becomes fp32.
    """
    places = {f"t5.{name}": place for name, place in _places(config)}
    lora = _lora_shapes(config) if any(name.split(".")[0] in _LORA for name in tensors) else {}
    require_shapes(origin, tensors, {**{name: place.shape for name, place in places.items()}, **lora})
    weights = {place.target: promoted(tensors[name]) * place.factor for name, place in places.items()}
    for update in sorted({name.rsplit(".", 1)[0] for name in lora}):
        weights[places[_updated(update)].target] += (LORA_ALPHA / LORA_RANK) * (
            promoted(tensors[f"{update}.lora_B"]) @ promoted(tensors[f"{update}.lora_A"])
        )
    return weights


def lora_matrices(tensors: Mapping[str, Tensor]) -> int:
    """How many matrices the LoRA tensors among ``tensors`` add to."""
    return sum(name.split(".")[0] in _LORA and name.endswith(".lora_A") for name in tensors)


def is_t5(name: str) -> bool:
    """Whether a name of the official wrapper belongs to the backbone: its own tensors and LoRA's."""
    return name.startswith("t5.") or name.split(".")[0] in _LORA


def _updated(update: str) -> str:
    """``project_q_lora.3`` -> the matrix it adds to."""
    kind, layer = update.split(".")
    stack, projection = _LORA[kind]
    return f"t5.{stack}.layers.{layer}.self_att.self_attention.{projection}.weight"


def _lora_shapes(config: Any) -> dict[str, Shape]:
    """[r, H] and [E, r] for every layer; the official decoder list is as long as the encoder's, as the stacks are."""
    inner, layers = config.num_heads * config.d_kv, {"encoder": config.num_layers, "decoder": config.num_decoder_layers}
    shapes: dict[str, Shape] = {}
    for kind, (stack, _) in _LORA.items():
        for layer in range(layers[stack]):
            shapes[f"{kind}.{layer}.lora_A"] = (LORA_RANK, config.d_model)
            shapes[f"{kind}.{layer}.lora_B"] = (inner, LORA_RANK)
    return shapes


def _places(config: Any) -> Iterator[tuple[str, _Place]]:
    hidden, heads, buckets = config.d_model, config.num_heads, config.relative_attention_num_buckets
    yield "input_embedding.weight", _Place("shared.weight", (config.vocab_size, hidden), SCALE)
    for stack, short, layers in (("encoder", "enc", config.num_layers), ("decoder", "dec", config.num_decoder_layers)):
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"position_bias_{short}.relative_attention_bias", _Place(table, (buckets, heads))
        yield f"{stack}.output_layernorm.weight", _Place(f"{stack}.final_layer_norm.weight", (hidden,))
        for layer in range(layers):
            yield from _layer(f"{stack}.layers.{layer}", f"{stack}.block.{layer}.layer", config, stack == "decoder")


def _layer(source: str, target: str, config: Any, cross: bool) -> Iterator[tuple[str, _Place]]:
    hidden, wide = config.d_model, config.d_ff
    yield from _attention(f"{source}.self_att", f"{target}.0", "SelfAttention", config)
    if cross:
        yield from _attention(f"{source}.cross_att", f"{target}.1", "EncDecAttention", config)
    last = f"{target}.{2 if cross else 1}"
    yield f"{source}.ffn.layernorm_before_ffn.weight", _Place(f"{last}.layer_norm.weight", (hidden,))
    root = round(SCALE**0.5)
    yield f"{source}.ffn.ffn.w_in.w.weight", _Place(f"{last}.DenseReluDense.wi.weight", (wide, hidden), root)
    yield f"{source}.ffn.ffn.w_out.weight", _Place(f"{last}.DenseReluDense.wo.weight", (hidden, wide), root)


def _attention(source: str, target: str, kind: str, config: Any) -> Iterator[tuple[str, _Place]]:
    """Cross-attention, too, is called ``self_attention`` inside ModelCenter's ``cross_att``."""
    hidden, inner = config.d_model, config.num_heads * config.d_kv
    yield f"{source}.layernorm_before_attention.weight", _Place(f"{target}.layer_norm.weight", (hidden,))
    for letter in "qkv":
        place = _Place(f"{target}.{kind}.{letter}.weight", (inner, hidden))
        yield f"{source}.self_attention.project_{letter}.weight", place
    yield f"{source}.self_attention.attention_out.weight", _Place(f"{target}.{kind}.o.weight", (hidden, inner), SCALE)
