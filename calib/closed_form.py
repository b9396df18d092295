"""Where fitting starts: plugins computed by regression, layer by layer, before any gradient step.

A layer with plugins computes ``norm(x + u + D)`` where the backbone computes ``norm(x' + FFN(x'))``. With the mixer at
its mean, u is known, so the best correction of rank r that is linear in [u; x] has a closed form (reduced-rank
regression). It is scaled into the part of tanh that is nearly linear, and its output side refitted through the tanh.
Where adapters start at random instead, mixers start by preferring tokens with small FFN outputs.
Letters: N tokens, H hidden size, r adapter width.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from exporter.backbone import Backbone
from exporter.methods.variator import LayerPlugin, VariatorEncoder, VariatorPlugins

TANH_INPUT_STD = 0.6  # smaller is more linear, but then large output weights amplify rounding
RIDGE = 1e-2  # of the mean variance of [u; x]
OUTPUT_RIDGE = 1e-6
QUIET_UNIT = 0.5  # of the mean norm of FFN outputs, one unit of a mixer's logit

Batch = Mapping[str, Tensor]


@torch.no_grad()
def initialise(
    backbone: Backbone,
    plugins: Mapping[int, VariatorPlugins],
    batches: Sequence[Batch],
    *,
    after_layer: Callable[[int], None] = lambda layer: None,
    regressed: Collection[int] | None = None,
) -> None:
    """Overwrite ``plugins`` (by ratio). ``batches``: tokenised texts; a few thousand tokens per 100 of 2H suffice.

    Every layer is fitted to the backbone's own trajectory on the inputs it gets from the fitted layers before it.
    ``regressed``: the ratios whose adapters are fitted too, all by default; the others get their mixers only.
    """
    encoder = VariatorEncoder(backbone)
    masks = [batch["attention_mask"].float() for batch in batches]
    additive = [((1.0 - mask) * torch.finfo(torch.float32).min)[:, None, None, :] for mask in masks]
    teacher = [encoder.embed(batch["input_ids"], batch.get("token_type_ids")) for batch in batches]
    students = {ratio: list(teacher) for ratio in plugins if regressed is None or ratio in regressed}
    for index, layer in enumerate(backbone.layers):
        scale = _norm_scale(backbone, layer)
        totals, inputs, norms = [], [], []
        for number, h in enumerate(teacher):
            x = backbone.host.attend(layer, h, additive[number])
            y = backbone.host.feed_forward(layer, x)
            real = masks[number] > 0.5
            inputs.append(x[real].float())
            norms.append(y[real].float().norm(dim=-1))
            totals.append(x + y)
            teacher[number] = backbone.host.finish(layer, totals[-1])
        direction = quiet_direction(torch.cat(inputs), torch.cat(norms))
        for ratio, one in plugins.items():
            # Measured on MiniLM: under regressed adapters, mixers that start uneven end lower and lose precision.
            _set_mixer(one.mux_layer[index], torch.zeros_like(direction) if ratio in students else direction)
        for ratio, states in students.items():
            plugin = plugins[ratio].mux_layer[index]
            assert isinstance(plugin, LayerPlugin)
            seen = [
                _seen(backbone, layer, plugin, h, mask, extra)
                for h, mask, extra in zip(states, masks, additive, strict=True)
            ]
            _fit_adapter(plugin, seen, totals, masks, scale)
            for number, (x, y) in enumerate(seen):
                states[number] = backbone.host.finish(layer, x + plugin.split(y, x))
        after_layer(index)


def quiet_direction(x: Tensor, norms: Tensor) -> Tensor:
    """The w [H] for which w . x falls by 1 when a token's FFN output grows by ``QUIET_UNIT`` of its mean norm.

    x [N,H], norms [N]. A few tokens (separators, punctuation) have FFN outputs many times larger than all others; in a
    mean they drown their neighbours, and repeated to these they do most of the damage. The norm is nearly linear in x.
    """
    centred = x - x.mean(0)
    variance = (centred.T @ centred).double()
    variance += RIDGE * variance.diagonal().mean() * torch.eye(len(variance), dtype=torch.float64)
    slope = torch.linalg.solve(variance, (centred.T @ (norms - norms.mean())).double()).float()
    return -slope / (QUIET_UNIT * norms.mean()).clamp_min(1e-6)


def _set_mixer(plugin: nn.Module, direction: Tensor) -> None:
    """Every position's logit is ``direction`` times its own token."""
    assert isinstance(plugin, LayerPlugin)
    mixer = plugin.mux_layer
    nn.init.zeros_(mixer.bias)
    mixer.weight.copy_(torch.block_diag(*[direction[None]] * plugin.ratio))


def _seen(
    backbone: Backbone, layer: nn.Module, plugin: LayerPlugin, h: Tensor, mask: Tensor, additive: Tensor
) -> tuple[Tensor, Tensor]:
    """The plugin's inputs in this layer: x [B,S,H] and the FFN's output for merged tokens y [B,m,H]."""
    x = backbone.host.attend(layer, h, additive)
    return x, backbone.host.feed_forward(layer, plugin.merge(x, mask.to(x.dtype)))


def _fit_adapter(
    plugin: LayerPlugin, seen: Sequence[tuple[Tensor, Tensor]], totals: Sequence[Tensor], masks: Iterable[Tensor],
    scale: Tensor,
) -> None:  # fmt: skip
    inputs, wanted, weights = [], [], []
    for (x, y), total, mask in zip(seen, totals, masks, strict=True):
        real = mask > 0.5
        repeated = y.repeat_interleave(plugin.ratio, 1)[:, : x.shape[1]]
        inputs.append(torch.cat([repeated, x], -1)[real].float())
        wanted.append((total - x - repeated)[real].float())
        # The closing norm divides a token's error by its spread.
        weights.append(1.0 / total[real].float().var(-1, unbiased=False).clamp_min(1e-6))
    x, d, w = torch.cat(inputs), torch.cat(wanted), torch.cat(weights)
    adapter = plugin.demux_adapter
    down, shift = low_rank_features(x, d, w / w.mean(), scale, adapter.w_in.out_features)
    adapter.w_in.weight.copy_(down)
    adapter.w_in.bias.copy_(shift)
    up, bias = _output_side(torch.tanh(x @ down.T + shift), d, w / w.mean())
    adapter.w_out.weight.copy_(up)
    adapter.w_out.bias.copy_(bias)


def low_rank_features(x: Tensor, d: Tensor, weight: Tensor, scale: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The ``rank`` linear features of x [N,2H] that explain d [N,H] best: (down [r,2H], shift [r]).

    Errors count per token by ``weight`` [N] and per channel by ``scale`` [H]. Features have mean 0 and standard
    deviation ``TANH_INPUT_STD``.
    """
    mean = (weight[:, None] * x).sum(0) / weight.sum()
    centred = x - mean
    weighted = centred * weight[:, None]
    variance = (weighted.T @ centred).double()
    variance += RIDGE * variance.diagonal().mean() * torch.eye(len(variance), dtype=torch.float64)
    cross = (weighted.T @ (d * scale)).double()
    full = torch.linalg.solve(variance, cross)  # [2H, H], the regression without a limit on rank
    explained = full.T @ cross
    directions = torch.linalg.eigh((explained + explained.T) / 2).eigenvectors[:, -rank:]
    down = (full @ directions).float()  # [2H, r]
    if down.shape[1] < rank:  # wider than the hidden size: the rest starts at random, where gradients find it
        down = torch.cat([down, torch.randn(len(down), rank - down.shape[1])], 1)
    spread = (centred @ down).std(0).clamp_min(1e-6)
    down = down * (TANH_INPUT_STD / spread)
    return down.T.contiguous(), -(mean @ down)


def _output_side(features: Tensor, d: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of d [N,H] on features [N,r] and a constant: (up [H,r], bias [H])."""
    z = torch.cat([features, torch.ones(len(features), 1)], 1)
    weighted = z * weight[:, None]
    variance = (weighted.T @ z).double()
    variance += OUTPUT_RIDGE * len(z) * torch.eye(len(variance), dtype=torch.float64)
    solution = torch.linalg.solve(variance, (weighted.T @ d).double()).float()
    return solution[:-1].T.contiguous(), solution[-1]


def _norm_scale(backbone: Backbone, layer: nn.Module) -> Tensor:
    """The per-channel scale [H] of the norm that closes a layer, whatever that norm's class.

    A vector of +1 and -1 in equal numbers is already normalised, so the norm returns scale * vector + shift.
    """
    signs = torch.ones(1, 1, backbone.hidden_size)
    signs[..., ::2] = -1.0
    difference = backbone.host.finish(layer, signs) - backbone.host.finish(layer, -signs)
    return (difference * signs / 2).flatten().float().abs()
