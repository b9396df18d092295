"""Variator: plugins that merge k tokens into one around each feed-forward network of a frozen encoder.

Source: Variator (arXiv 2310.15724) and its official code, which knows T5; for post-norm hosts, placement and padding
rules are ours: the plugin sees the FFN's input x, and the layer closes with ``norm(x + u + D)``.
Letters: B batch, S sequence length, H hidden size, L layers, k ratio, m = ceil(S / k) groups, r adapter width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from compexport.errors import InputError, describe
from engines.manifest import Cost
from exporter import ops
from exporter.backbone import Backbone
from exporter.methods.span import SpanPlugins, linears
from exporter.methods.stored import loaded_exactly
from exporter.precision import lowest, wide

# "masked": padding never reaches a real token. "official": as the published code, pad tokens are merged like any other;
# only on hosts that plugins were published for does it include the published row mask of the attention.
PadMode = Literal["masked", "official"]
MAX_WIDTH = 64  # the official adapter width
EXTRA_SHARE = 0.01


class Mixer(nn.Module):
    """Weights of the k positions of a group: k logits from the k concatenated vectors."""

    def __init__(self, hidden: int, ratio: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(ratio, ratio * hidden) * (2 / (ratio * hidden)) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(ratio))


class Adapter(nn.Module):
    """The low-rank correction that tells the tokens of a group apart again."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.w_in = nn.Linear(2 * hidden, width)
        self.w_out = nn.Linear(width, hidden)
        for linear in (self.w_in, self.w_out):
            nn.init.normal_(linear.weight, std=0.01)
            nn.init.zeros_(linear.bias)


class LayerPlugin(nn.Module):
    """The plugin of one layer; parameter names are those of the official checkpoint."""

    def __init__(self, hidden: int, ratio: int, width: int, pad: PadMode) -> None:
        super().__init__()
        self.ratio, self.pad = ratio, pad
        self.mux_layer = Mixer(hidden, ratio)
        self.demux_adapter = Adapter(hidden, width)

    def merge(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [B,S,H], mask [B,S] of 0 and 1 in x's dtype -> [B,m,H]."""
        mixer = self.mux_layer
        if self.pad == "official":
            return ops.TOKEN_MERGE(x, mixer.weight, mixer.bias, ratio=self.ratio)
        return ops.MASKED_TOKEN_MERGE(x, mask, mixer.weight, mixer.bias, ratio=self.ratio)

    def split(self, y: Tensor, x: Tensor) -> Tensor:
        """y [B,m,H], x [B,S,H] -> [B,S,H]: each group's vector repeated, plus the correction."""
        down, up = self.demux_adapter.w_in, self.demux_adapter.w_out
        return ops.TOKEN_SPLIT(y, x, down.weight, down.bias, up.weight, up.bias, ratio=self.ratio)


class VariatorPlugins(nn.Module):
    """The plugins of all layers for one ratio. ``state_dict`` keys are ``mux_layer.{layer}.…`` as published."""

    def __init__(self, hidden: int, layers: int, ratio: int, width: int, pad: PadMode = "masked") -> None:
        super().__init__()
        self.ratio, self.width, self.pad = ratio, width, pad
        self.mux_layer = nn.ModuleList(LayerPlugin(hidden, ratio, width, pad) for _ in range(layers))

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def shrink(self, factor: float) -> None:
        """Fit a host whose feed-forward networks give ``factor`` times less (``exporter.precision``), in place."""
        for plugin in self.mux_layer:
            assert isinstance(plugin, LayerPlugin)
            down, up = plugin.demux_adapter.w_in, plugin.demux_adapter.w_out
            down.weight[:, : up.out_features].mul_(factor)
            up.weight.div_(factor)
            up.bias.div_(factor)

    @classmethod
    def from_tensors(
        cls, tensors: dict[str, Tensor], hidden: int, layers: int, pad: PadMode, origin: str
    ) -> VariatorPlugins:
        """Rebuild plugins from stored tensors; k and r are read from shapes, anything unexpected is refused."""
        first_bias = tensors.get("mux_layer.0.mux_layer.bias")
        first_down = tensors.get("mux_layer.0.demux_adapter.w_in.weight")
        if first_bias is None or first_down is None or not (first_bias.numel() and first_bias.dim() == 1):
            raise InputError(describe(f"{origin}: no Variator plugins", expected="tensors named mux_layer.0.…"))
        plugins = cls(hidden, layers, first_bias.shape[0], first_down.shape[0], pad)
        return loaded_exactly(plugins, tensors, origin)


Plugins = VariatorPlugins | SpanPlugins


def plugins_from_tensors(tensors: dict[str, Tensor], backbone: Backbone, pad: PadMode, origin: str) -> Plugins:
    """The plugins of either form that the stored tensors are; InputError where they fit neither, or not this model."""
    if any(name.startswith("low_rank.") for name in tensors):
        return SpanPlugins.from_tensors(tensors, backbone, origin)
    return VariatorPlugins.from_tensors(tensors, backbone.hidden_size, backbone.num_layers, pad, origin)


def default_width(backbone: Backbone, ratio: int) -> int:
    """The largest adapter width r <= 64 with which the plugins add at most 1 % to the backbone's parameters.

    Per layer the mixer has k*k*H + k parameters, the adapter 3*H*r + r + H. At least 4.
    """
    hidden = backbone.hidden_size
    budget = EXTRA_SHARE * backbone.params / backbone.num_layers
    room = budget - (ratio * ratio * hidden + ratio) - hidden
    return max(4, min(MAX_WIDTH, int(room // (3 * hidden + 1))))


@dataclass
class EncoderOutput:
    """``last_hidden_state`` [B,S,H]; ``hidden_states``: embeddings, then every layer's output, when asked for.

    The last of them is ``last_hidden_state``, after the norm that closes a pre-norm encoder.
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...] = ()


class VariatorEncoder(nn.Module):
    """A backbone's encoder with or without plugins.

    It runs the backbone's own submodules in its own ``forward``, so attaching plugins changes nothing in the
    backbone. With plugins, the second half of a layer is ``finish(h + split(feed_forward(merge(x)), x))`` with
    ``x = enter(h)``. With those of a span, hidden states from its first layer on are [B,m,H].
    """

    position_buckets: Tensor | None

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        require_own_layers(backbone)
        self.backbone = backbone
        self.encoder = backbone.encoder
        self.plugins: Plugins | None = None
        self.updated = nn.ModuleDict()
        self.register_buffer("position_buckets", backbone.host.position_buckets(self.encoder), persistent=False)

    def attach(self, plugins: Plugins) -> None:
        """Use ``plugins`` from the next call on; InputError if they have another number of layers."""
        if isinstance(plugins, VariatorPlugins) and len(plugins.mux_layer) != self.backbone.num_layers:
            raise InputError(
                describe(
                    "plugins do not fit", got=f"{len(plugins.mux_layer)} layers", expected=self.backbone.num_layers
                )
            )
        layers = self.backbone.layers
        self.updated = plugins.updated(layers) if isinstance(plugins, SpanPlugins) else nn.ModuleDict()
        self.plugins = plugins

    def detach(self) -> None:
        """Run as the plain backbone again."""
        self.plugins, self.updated = None, nn.ModuleDict()

    def embed(self, input_ids: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """Ids [B,S] -> [B,S,H]."""
        return self.backbone.host.embed(self.encoder, input_ids, token_type_ids)

    def attention_bias(self, mask: Tensor) -> Tensor:
        """Mask [B,S] of 0 and 1 in the hidden states' dtype -> what all layers add to their attention scores."""
        return self.backbone.host.attention_bias(self.encoder, additive(mask)[:, None, None, :], self.position_buckets)

    def run_layer(self, index: int, h: Tensor, bias: Tensor, mask: Tensor) -> Tensor:
        """One encoder layer, [B,S,H] -> [B,S,H]; bias as :meth:`attention_bias` makes it from mask [B,S]."""
        host, layer = self.backbone.host, self._layer(index)
        attended = host.attend(layer, h, bias)
        if self._pads and host.skips_padded_rows:
            attended = torch.where(mask.unsqueeze(-1) > 0, attended, h)
        x = host.enter(layer, attended)
        if not isinstance(self.plugins, VariatorPlugins):
            return host.finish(layer, attended + host.feed_forward(layer, x))
        plugin = self.plugins.mux_layer[index]
        assert isinstance(plugin, LayerPlugin)
        y = host.feed_forward(layer, plugin.merge(x, mask))
        return host.finish(layer, attended + plugin.split(y, x))

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        keep_states: bool = False,
    ) -> EncoderOutput:
        """input_ids, attention_mask, token_type_ids: [B,S] integers, padding on the right."""
        length = input_ids.shape[1]
        input_ids, attention_mask, token_type_ids = self._whole_groups(input_ids, attention_mask, token_type_ids)
        h = self.embed(input_ids, token_type_ids)
        mask = attention_mask.to(h.dtype)
        bias = self.attention_bias(mask)
        states = [h]
        for index in range(self.backbone.num_layers):
            if isinstance(self.plugins, SpanPlugins) and index == self.plugins.first:
                h, mask = self.plugins.merge(h, mask)
                bias = self.attention_bias(mask)
            h = self.run_layer(index, h, bias, mask)
            states.append(h)
        states[-1] = self.backbone.host.close(self.encoder, h)
        states = [state[:, :length] for state in states] if self._pads else states
        return EncoderOutput(states[-1], tuple(states) if keep_states else ())

    def _layer(self, index: int) -> nn.Module:
        return self.updated[str(index)] if str(index) in self.updated else self.backbone.layers[index]

    @property
    def _pads(self) -> bool:
        return self.plugins is not None and self.plugins.pad == "official"

    def _whole_groups(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """In "official" mode pad tokens take part in merging, so every group is completed with real ones."""
        if not self._pads:
            return input_ids, attention_mask, token_type_ids
        assert self.plugins is not None
        missing = (0, -input_ids.shape[1] % self.plugins.ratio)
        pad_id = int(self.backbone.config.pad_token_id or 0)
        types = None if token_type_ids is None else nn.functional.pad(token_type_ids, missing)
        return nn.functional.pad(input_ids, missing, value=pad_id), nn.functional.pad(attention_mask, missing), types


def require_own_layers(backbone: Backbone) -> None:
    """InputError for a model whose layers are one layer many times: plugins are fitted to each layer apart."""
    if backbone.host.sharing is not None:
        raise InputError(
            describe(
                f"{backbone.folder}: variator does not fit a model that shares its layers",
                got=repr(backbone.config.model_type),
                expected="an encoder whose layers differ",
                hint="build it with --method ode",
            )
        )


class VariatorModel(nn.Module):
    """Encoder plus the backbone's task head; what is traced. Outputs by task, in the order of :func:`output_names`."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.variator = VariatorEncoder(backbone)
        self.model = backbone.model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        h = self.variator(input_ids, attention_mask, token_type_ids).last_hidden_state
        return task_outputs(self.backbone, h, attention_mask)


def task_outputs(backbone: Backbone, h: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
    """Final hidden states [B,S,H] -> the task's output tensors, in fp32 at least."""
    if backbone.task == "feature-extraction":
        h = wide(h)
        return (h,) if backbone.pooling is None else (h, pool(h, attention_mask, backbone))
    if backbone.task == "label-words":
        return (wide(_word_logits(backbone, h, attention_mask)),)
    logits = wide(backbone.host.heads[backbone.task](backbone.model, h))
    if backbone.task == "question-answering":
        return logits[..., 0], logits[..., 1]
    return (logits,)


def _word_logits(backbone: Backbone, h: Tensor, attention_mask: Tensor) -> Tensor:
    """[B,C]: one decoder pass over the prefix, then the logits of the labels' words."""
    words, decoder = backbone.label_words, backbone.host.decoder
    assert words is not None and decoder is not None
    prefix, ids = (torch.tensor(numbers, device=h.device) for numbers in (words.decoder_input_ids, words.word_ids))
    return decoder.score(backbone.model, h, additive(attention_mask.to(h.dtype)).unsqueeze(1), prefix, ids)


def additive(mask: Tensor) -> Tensor:
    """Mask of 0 and 1 -> 0 where there is a token, as low a number as fits where there is none."""
    return (1.0 - mask) * lowest(mask.dtype)


def output_names(backbone: Backbone) -> tuple[str, ...]:
    """Names of the task's outputs, as optimum and sentence-transformers use them."""
    if backbone.task == "feature-extraction":
        names = ("last_hidden_state", "sentence_embedding")
        return names if backbone.pooling else names[:1]
    return ("start_logits", "end_logits") if backbone.task == "question-answering" else ("logits",)


def pool(h: Tensor, attention_mask: Tensor, backbone: Backbone) -> Tensor:
    """[B,S,H] -> [B,H] as the folder's sentence-transformers modules describe it."""
    assert backbone.pooling is not None
    mask = attention_mask.to(h.dtype).unsqueeze(-1)
    if backbone.pooling.mode == "cls":
        pooled = h[:, 0]
    elif backbone.pooling.mode == "max":
        pooled = torch.where(mask > 0, h, torch.finfo(h.dtype).min).amax(1)
    else:
        pooled = (h * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return nn.functional.normalize(pooled, dim=-1) if backbone.pooling.normalize else pooled


def cost(backbone: Backbone, plugins: Plugins | None) -> Cost:
    """MACs of one sequence, encoder and task head; embedding look-ups count 0 (methods.md 1d and 5)."""
    hidden, layers = backbone.hidden_size, backbone.num_layers
    attention, ffn, per_pair = _layer_macs(backbone)
    head_fixed, head_token = _head_macs(backbone)
    if plugins is None:
        return Cost(fixed=head_fixed, per_token=layers * (attention + ffn) + head_token, per_pair=layers * per_pair)
    if isinstance(plugins, SpanPlugins):
        return _span_cost(backbone, plugins)
    ratio, width = plugins.ratio, plugins.width
    # Mixer: k logits of k*H each, and the weighted sum of k vectors. Adapter: the token half of its input per token;
    # the group half of it, and its output for all k slots, per group.
    mixer = ratio * ratio * hidden + ratio * hidden
    per_group = ffn + mixer + hidden * width + ratio * hidden * width
    return Cost(
        fixed=head_fixed,
        per_token=layers * (attention + hidden * width) + head_token,
        per_group=layers * per_group,
        group=ratio,
        per_pair=layers * per_pair,
    )


def _span_cost(backbone: Backbone, plugins: SpanPlugins) -> Cost:
    """Whole layers before the span; in it all products, those of the updates too, once for every group."""
    attention, ffn, per_pair = _layer_macs(backbone)
    head_fixed, head_token = _head_macs(backbone)
    first, inside = plugins.first, backbone.num_layers - plugins.first
    updates = sum(
        plugins.rank * (linear.in_features + linear.out_features)
        for layer in backbone.layers[first:]
        for _, linear in linears(layer)
    )
    mixer = plugins.ratio * plugins.ratio * backbone.hidden_size + plugins.ratio * backbone.hidden_size
    return Cost(
        fixed=head_fixed,
        per_token=first * (attention + ffn) + head_token,
        per_group=inside * (attention + ffn) + updates + mixer,
        group=plugins.ratio,
        alone=1,
        per_pair=first * per_pair,
        per_group_pair=inside * per_pair,
    )


def _layer_macs(backbone: Backbone) -> tuple[int, int, int]:
    """MACs of a bare layer: attention's and the FFN's products per token, scores and their use per pair of tokens."""
    layer = backbone.layers[0]
    attention = list(backbone.host.attention(layer).modules())
    query = next(module for module in attention if isinstance(module, nn.Linear))
    products = _macs(attention)
    return products, _macs(layer.modules()) - products, 2 * query.out_features


def _head_macs(backbone: Backbone) -> tuple[int, int]:
    """MACs of the linear layers around the encoder's: (per sequence, per token)."""
    if backbone.task == "label-words":
        return _decoder_macs(backbone)
    projection = getattr(backbone.encoder, "embeddings_project", None)
    inside = {*backbone.layers.modules(), projection}
    per_token = _macs([projection]) if projection is not None else 0
    if backbone.task == "feature-extraction":
        return 0, per_token  # pooling costs no product, and nobody reads the pooler's output
    around = _macs([module for module in backbone.model.modules() if module not in inside])
    if backbone.task == "sequence-classification":
        return around, per_token
    return 0, per_token + around


def _decoder_macs(backbone: Backbone) -> tuple[int, int]:
    """One pass over the prefix: scores and sums of cross-attention per encoder token, all else per sequence."""
    words, decoder = backbone.label_words, backbone.host.decoder
    assert words is not None and decoder is not None
    prefix, layers = len(words.decoder_input_ids), decoder.layers(backbone.model)
    width = next(module for module in layers[0].modules() if isinstance(module, nn.Linear)).out_features
    fixed = prefix * _macs(layers.modules()) + len(layers) * prefix * prefix * 2 * width
    per_token = len(layers) * 2 * decoder.heads(backbone.config) * prefix * backbone.hidden_size
    return fixed + len(words.word_ids) * backbone.hidden_size, per_token


def _macs(modules: Iterable[nn.Module]) -> int:
    """Multiply-accumulates per vector of all linear layers among ``modules``."""
    return sum(m.in_features * m.out_features for m in modules if isinstance(m, nn.Linear))
