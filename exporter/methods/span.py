"""Spans: merge once, before layer i, and stay merged to the end, so that attention runs on fewer tokens too.

Variator's plugins merge around every feed-forward network and leave attention at full length, which bounds what a ratio
can save. Here every layer from the i-th on runs at one vector per group. The first token, which a classifier reads,
is a group of its own and nothing has to be told apart again; low-rank updates of the layers' products do the rest.
The idea, its placement and the updates are ours; merging is Variator's (arXiv 2310.15724).
Letters: B batch, S sequence length, H hidden size, k ratio, m = 1 + ceil((S - 1) / k) groups, r rank.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from compexport.errors import InputError, describe
from exporter import ops
from exporter.backbone import Backbone
from exporter.methods.stored import loaded_exactly

EXTRA_SHARE = 0.01
MAX_RANK = 64
TASK = "sequence-classification"


class LowRank(nn.Module):
    """An update ``up(down(x))`` of a linear layer; 0 at first."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))


class _Updated(nn.Module):
    """A linear layer of the backbone and its update."""

    def __init__(self, linear: nn.Linear, update: LowRank) -> None:
        super().__init__()
        self.linear, self.update = linear, update

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear(x) + F.linear(F.linear(x, self.update.down), self.update.up)
        return out


class SpanPlugins(nn.Module):
    """What one ratio needs: how tokens are mixed, and the updates of all linear layers from layer ``first`` on.

    ``first`` counts from 0. Tensors: ``mixer.weight`` [k,k*H], ``mixer.bias`` [k], and of every linear layer
    ``low_rank.{layer}.{its name, . as _}.down`` [r,in] and ``.up`` [out,r].
    """

    pad = "masked"

    def __init__(self, backbone: Backbone, ratio: int, first: int, rank: int) -> None:
        """InputError for a task whose answer is read from more than the first token, or a layer there is not."""
        require_span(backbone, first)
        super().__init__()
        self.ratio, self.first, self.rank = ratio, first, rank
        hidden = backbone.hidden_size
        self.mixer = nn.Module()
        # Equal weights: the mean of a group. Anything else has to be learnt.
        self.mixer.weight = nn.Parameter(torch.zeros(ratio, ratio * hidden))
        self.mixer.bias = nn.Parameter(torch.zeros(ratio))
        self.low_rank = nn.ModuleDict(
            {
                str(index): nn.ModuleDict(
                    {
                        name.replace(".", "_"): LowRank(linear.in_features, linear.out_features, rank)
                        for name, linear in linears(backbone.layers[index])
                    }
                )
                for index in range(first, backbone.num_layers)
            }
        )
        self.register_buffer("_equal", torch.zeros(ratio, ratio), persistent=False)
        self.register_buffer("_none", torch.zeros(ratio), persistent=False)

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], backbone: Backbone, origin: str) -> SpanPlugins:
        """Rebuild from stored tensors; k, r and the first layer are read from them, anything unexpected is refused."""
        layers = [int(name.split(".")[1]) for name in tensors if name.startswith("low_rank.")]
        ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".down")}
        if "mixer.bias" not in tensors or not layers or len(ranks) != 1:
            raise InputError(describe(f"{origin}: no span", expected="tensors named mixer.… and low_rank.…"))
        plugins = cls(backbone, len(tensors["mixer.bias"]), min(layers), ranks.pop())
        return loaded_exactly(plugins, tensors, origin)

    def merge(self, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """h [B,S,H], mask [B,S] of 0 and 1 in h's dtype -> [B,m,H] and the mask of groups [B,m]."""
        alone = (self.ratio - 1, 0)  # so many empty places before the first token make a group of its own
        h, mask = F.pad(h, (0, 0, *alone)), F.pad(mask, alone)
        merged = ops.MASKED_TOKEN_MERGE(h, mask, self.mixer.weight, self.mixer.bias, ratio=self.ratio)
        any_real = ops.MASKED_TOKEN_MERGE(mask.unsqueeze(-1), mask, self._equal, self._none, ratio=self.ratio)
        return merged, (any_real.squeeze(-1) > 0.5).to(mask.dtype)

    def updated(self, layers: Sequence[nn.Module]) -> nn.ModuleDict:
        """The layers of the span by number, each with its updates; their weights are the backbone's own."""
        return nn.ModuleDict({index: _updated(layers[int(index)], of) for index, of in self.low_rank.items()})

    def goals(self, states: Sequence[Tensor], mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the outputs of embeddings and layers should be, and which of their places count.

        ``states``: the backbone's own [B,S,H], the embeddings' first; mask [B,S]. Merged ones should be their group's
        mean.
        """
        whole = [(state, mask) for state in states[: self.first + 1]]
        return [*whole, *(self._means(state, mask) for state in states[self.first + 1 :])]

    def _means(self, h: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        ends = (self.ratio - 1, (1 - mask.shape[1]) % self.ratio)
        real = F.pad(mask.to(h.dtype), ends).unflatten(1, (-1, self.ratio))
        sums = (F.pad(h, (0, 0, *ends)).unflatten(1, (-1, self.ratio)) * real.unsqueeze(-1)).sum(2)
        counts = real.sum(-1)
        return sums / counts.clamp_min(1.0).unsqueeze(-1), (counts > 0).to(mask.dtype)


def require_span(backbone: Backbone, first: int) -> None:
    """InputError where a span from layer ``first`` (from 0) makes no sense for this model."""
    if backbone.task != TASK:
        hint = "leave --span out: plugins around each feed-forward network serve every task"
        raise InputError(describe("--span", got=f"a model for {backbone.task}", expected=f"one for {TASK}", hint=hint))
    if not 0 <= first < backbone.num_layers:
        expected = f"a layer from 1 to {backbone.num_layers}"
        raise InputError(describe("--span", got=first + 1, expected=expected))


def linears(layer: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers of an encoder layer, with their names in it."""
    return ((name, module) for name, module in layer.named_modules() if isinstance(module, nn.Linear))


def _updated(layer: nn.Module, updates: nn.Module) -> nn.Module:
    """A copy of the layer's structure over the same tensors, its linear layers with their updates."""
    tensors = {id(one): one for one in (*layer.parameters(), *layer.buffers())}
    twin = copy.deepcopy(layer, tensors)
    for name, linear in list(linears(twin)):
        update = updates.get_submodule(name.replace(".", "_"))
        assert isinstance(update, LowRank)
        twin.set_submodule(name, _Updated(linear, update))
    return twin


def default_rank(backbone: Backbone, ratio: int, first: int) -> int:
    """The largest rank r <= 64 with which a span adds at most 1 % to the backbone's parameters; at least 1."""
    hidden = backbone.hidden_size
    per_rank = sum(
        linear.in_features + linear.out_features for layer in backbone.layers[first:] for _, linear in linears(layer)
    )
    room = EXTRA_SHARE * backbone.params - (ratio * ratio * hidden + ratio)
    return max(1, min(MAX_RANK, int(room // per_rank)))
