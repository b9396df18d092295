"""Where fitting starts: mixers that prefer tokens with small FFN outputs. Adapters start small and random.

Letters: N tokens, B batch, S sequence length, H hidden size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from calib.arithmetic import autocast, to_device
from calib.batches import Batch, Rows, batches_by_length, collate_for
from calib.progress import Progress, silent
from calib.settings import FitSettings
from exporter.backbone import Backbone
from exporter.methods.variator import LayerPlugin, VariatorEncoder, VariatorPlugins

RIDGE = 1e-2  # of the mean variance of x
QUIET_UNIT = 0.5  # of the mean norm of FFN outputs, one unit of a mixer's logit
TOKENS_PER_CHANNEL = 52
SHARE = 0.2  # of max_seconds, about the most that the start may take


def start_mixers(
    backbone: Backbone,
    plugins: Mapping[int, VariatorPlugins],
    rows: Rows,
    settings: FitSettings,
    device: torch.device,
    progress: Progress = silent,
) -> None:
    """Overwrite the mixers of ``plugins`` (by ratio) with what a random sample of ``rows`` says about quiet tokens.

    Backbone and plugins are on ``device``.
    """
    sample: list[Mapping[str, Any]] = []
    tokens = 0
    for index in torch.randperm(len(rows)).tolist():
        sample.append(rows[index])
        tokens += len(rows[index]["input_ids"])
        if tokens >= TOKENS_PER_CHANNEL * backbone.hidden_size:
            break
    made = batches_by_length(sample, 2 * settings.batch_size, collate_for(backbone))
    batches = [to_device(batch, device) for batch in made]
    with autocast(settings.precision):
        prefer_quiet_tokens(backbone, plugins, _affordable(backbone, batches, settings), progress)


@torch.no_grad()
def _affordable(backbone: Backbone, batches: list[Batch], settings: FitSettings) -> list[Batch]:
    """Batches, spread over all lengths, that take about ``SHARE`` of ``max_seconds``; at least two."""
    if settings.max_seconds is None or len(batches) <= 2:
        return batches
    middle = batches[len(batches) // 2]
    encoder = VariatorEncoder(backbone).to(middle["input_ids"].device)
    encoder(**middle)  # the first run is slower
    begun = time.monotonic()
    encoder(**middle)
    fitting = int(SHARE * settings.max_seconds / (time.monotonic() - begun))
    step = -(-len(batches) // max(fitting, 2))
    return batches[step // 2 :: step]


@torch.no_grad()
def prefer_quiet_tokens(
    backbone: Backbone,
    plugins: Mapping[int, VariatorPlugins],
    batches: Sequence[Batch],
    progress: Progress = silent,
) -> None:
    """Set every mixer to its layer's quiet direction, measured on the backbone's own run over ``batches``."""
    encoder, host = VariatorEncoder(backbone).to(batches[0]["input_ids"].device), backbone.host
    masks = [batch["attention_mask"].float() for batch in batches]
    states = [encoder.embed(batch["input_ids"], batch.get("token_type_ids")) for batch in batches]
    biases = [encoder.attention_bias(mask.to(h.dtype)) for mask, h in zip(masks, states, strict=True)]
    for index, layer in enumerate(backbone.layers):
        progress("mixer start", index, backbone.num_layers)
        inputs, norms = [], []
        for number, h in enumerate(states):
            attended = host.attend(layer, h, biases[number])
            x = host.enter(layer, attended)
            y = host.feed_forward(layer, x)
            real = masks[number] > 0.5
            inputs.append(x[real].float())
            norms.append(y[real].float().norm(dim=-1))
            states[number] = host.finish(layer, attended + y)
        direction = quiet_direction(torch.cat(inputs), torch.cat(norms))
        for one in plugins.values():
            _set_mixer(one.mux_layer[index], direction)


def quiet_direction(x: Tensor, norms: Tensor) -> Tensor:
    """The w [H] for which w . x falls by 1 when a token's FFN output grows by ``QUIET_UNIT`` of its mean norm.

    x [N,H], norms [N]. A few tokens (separators, punctuation) have FFN outputs many times larger than all others; in a
    mean they drown their neighbours, and repeated to these they do most of the damage. The norm is nearly linear in x.
    """
    centred = x - x.mean(0)
    variance = (centred.T @ centred).double()
    variance += RIDGE * variance.diagonal().mean() * torch.eye(len(variance), dtype=torch.float64, device=x.device)
    slope = torch.linalg.solve(variance, (centred.T @ (norms - norms.mean())).double()).float()
    return -slope / (QUIET_UNIT * norms.mean()).clamp_min(1e-6)


def _set_mixer(plugin: nn.Module, direction: Tensor) -> None:
    """Every position's logit is ``direction`` times its own token."""
    assert isinstance(plugin, LayerPlugin)
    mixer = plugin.mux_layer
    nn.init.zeros_(mixer.bias)
    mixer.weight.copy_(torch.block_diag(*[direction[None]] * plugin.ratio))
