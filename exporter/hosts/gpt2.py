"""GPT-2: a pre-norm decoder with learnt positions, whose layers may be one block many times."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compexport.errors import InputError, describe
from exporter.hosts.bert import inside
from exporter.hosts.host import Host, Repeated, Sharing
from exporter.hosts.shared import repeated_layers, stated_groups


def _groups(base: Any, config: Any) -> list[Repeated]:
    """InputError for switches that make the same block another function in every layer, or one of more inputs."""
    for switch in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if getattr(config, switch, False):
            raise InputError(describe("ode does not fit this GPT-2", got=f"{switch} true", expected="false"))
    return repeated_layers(base.h, config)


def _embed(
    base: Any, input_ids: Tensor, token_type_ids: Tensor | None = None, position_ids: Tensor | None = None
) -> Tensor:
    """Without ``position_ids`` the first token's is 0; GPT-2 knows no types."""
    places = torch.arange(input_ids.shape[1], device=input_ids.device)[None] if position_ids is None else position_ids
    out: Tensor = base.drop(base.wte(input_ids) + base.wpe(places))
    return out


def _attended(layer: Any, h: Tensor, bias: Tensor, cache: Any = None) -> Tensor:
    out: Tensor = layer.attn(layer.ln_1(h), past_key_values=cache, attention_mask=bias)[0]
    return out


def _attend(layer: Any, h: Tensor, bias: Tensor) -> Tensor:
    return h + _attended(layer, h, bias)


HOSTS: dict[str, Host] = {
    "gpt2": Host(
        encoder=inside("transformer"),
        layers=lambda base: base.h,
        embed=_embed,
        attention=lambda layer: layer.attn,
        attend=_attend,
        enter=lambda layer, h: layer.ln_2(h),
        feed_forward=lambda layer, z: layer.mlp(z),
        close=lambda base, h: base.ln_f(h),
        classes={"text-generation": "GPT2LMHeadModel"},
        heads={"text-generation": lambda model, h: model.lm_head(h)},
        sharing=Sharing(groups=_groups, stated=stated_groups, embed=_embed, attended=_attended, causal=True),
    )
}
