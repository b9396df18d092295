"""The official Variator network, written out plainly: what an import must reproduce.

It knows nothing of the exporter and of transformers: ModelCenter's T5 (residual stream at 1/100, masked rows *and*
columns, epsilon 1e-6) with a plugin around the feed-forward network of every encoder layer, from a dict of tensors
under the official wrapper's names. Loops over samples, heads and groups where a formula would need thinking.
Letters: H hidden size, n length, k ratio; weights are [out, in].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
EPSILON = 1e-6
LORA_RANK, LORA_SCALING = 16, 2.0  # alpha 32


@dataclass(frozen=True)
class Sizes:
    vocab: int = 120
    hidden: int = 24
    heads: int = 3
    head_width: int = 10  # heads x head width differs from the hidden size, so that no transposed matrix fits
    wide: int = 40
    layers: int = 2
    buckets: int = 32
    max_distance: int = 128
    width: int = 64


class Official:
    """One official wrapper. ``ratio`` None runs it without plugins; arithmetic is in the dtype of ``tensors``."""

    def __init__(self, tensors: Tensors, sizes: Sizes, ratio: int | None) -> None:
        self.tensors, self.sizes, self.ratio = tensors, sizes, ratio

    # --- encoder ---------------------------------------------------------------------------------------------------

    def embed(self, ids: Tensor) -> Tensor:
        return self.tensors["t5.input_embedding.weight"][ids]

    def encode(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """Ids, mask [B,n] -> the stream before the first and after every layer, and last the normed output."""
        states = [self.embed(ids)]
        for layer in range(self.sizes.layers):
            states.append(self.encoder_layer(layer, states[-1], mask))
        return [*states, norm(states[-1], self.tensors["t5.encoder.output_layernorm.weight"])]

    def encoder_layer(self, layer: int, h: Tensor, mask: Tensor) -> Tensor:
        name = f"t5.encoder.layers.{layer}"
        allowed = mask[:, :, None].bool() & mask[:, None, :].bool()
        n = h.shape[1]
        x = norm(h, self.tensors[f"{name}.self_att.layernorm_before_attention.weight"])
        bias = self.position_bias("enc", n, n)
        h = h + self.attention(f"{name}.self_att.self_attention", x, x, allowed, bias, layer)
        x = norm(h, self.tensors[f"{name}.ffn.layernorm_before_ffn.weight"])
        if self.ratio is None:
            return h + self.feed_forward(name, x)
        return h + self.demux(layer, self.feed_forward(name, self.mux(layer, x)), x)

    def mux(self, layer: int, x: Tensor) -> Tensor:
        """[B,n,H] -> [B,n/k,H]; n must be a multiple of k, as there."""
        weight = self.tensors[f"mux_layer.{layer}.mux_layer.weight"]
        bias = self.tensors[f"mux_layer.{layer}.mux_layer.bias"]
        assert self.ratio is not None and x.shape[1] % self.ratio == 0
        merged = []
        for start in range(0, x.shape[1], self.ratio):
            group = [x[:, start + i] for i in range(self.ratio)]
            share = torch.softmax(torch.cat(group, dim=-1) @ weight.T + bias, dim=-1)
            merged.append(sum((share[:, i : i + 1] * group[i] for i in range(self.ratio)), torch.zeros_like(group[0])))
        return torch.stack(merged, dim=1)

    def demux(self, layer: int, y: Tensor, x: Tensor) -> Tensor:
        adapter = f"mux_layer.{layer}.demux_adapter"
        out = []
        for position in range(x.shape[1]):
            assert self.ratio is not None
            u = y[:, position // self.ratio]
            inner = torch.cat([u, x[:, position]], dim=-1) @ self.tensors[f"{adapter}.w_in.weight"].T
            inner = torch.tanh(inner + self.tensors[f"{adapter}.w_in.bias"])
            correction = inner @ self.tensors[f"{adapter}.w_out.weight"].T + self.tensors[f"{adapter}.w_out.bias"]
            out.append(u + correction)
        return torch.stack(out, dim=1)

    def feed_forward(self, name: str, x: Tensor) -> Tensor:
        inner = torch.relu(x @ self.tensors[f"{name}.ffn.ffn.w_in.w.weight"].T)
        return inner @ self.tensors[f"{name}.ffn.ffn.w_out.weight"].T

    # --- decoder ---------------------------------------------------------------------------------------------------

    def logits(self, decoder_ids: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
        """Decoder ids [B,q], encoder output [B,n,H], its mask [B,n] -> [B,q,V]: the tied embedding, unscaled."""
        h = self.embed(decoder_ids)
        q, n = h.shape[1], memory.shape[1]
        causal = torch.tensor([[[key <= query for key in range(q)] for query in range(q)]])
        across = mask[:, None, :].bool().expand(-1, q, n)
        for layer in range(self.sizes.layers):
            name = f"t5.decoder.layers.{layer}"
            x = norm(h, self.tensors[f"{name}.self_att.layernorm_before_attention.weight"])
            bias, below = self.position_bias("dec", q, q), causal.expand(len(h), -1, -1)
            h = h + self.attention(f"{name}.self_att.self_attention", x, x, below, bias, layer)
            x = norm(h, self.tensors[f"{name}.cross_att.layernorm_before_attention.weight"])
            h = h + self.attention(f"{name}.cross_att.self_attention", x, memory, across, None, layer)
            x = norm(h, self.tensors[f"{name}.ffn.layernorm_before_ffn.weight"])
            h = h + self.feed_forward(name, x)
        h = norm(h, self.tensors["t5.decoder.output_layernorm.weight"])
        return h @ self.tensors["t5.input_embedding.weight"].T

    # --- both ------------------------------------------------------------------------------------------------------

    def attention(
        self, name: str, x: Tensor, memory: Tensor, allowed: Tensor, bias: Tensor | None, layer: int
    ) -> Tensor:
        """Queries from x [B,q,H], keys and values from memory [B,n,H]; a query that may see nothing gets exactly 0."""
        query = x @ self.tensors[f"{name}.project_q.weight"].T
        key = memory @ self.tensors[f"{name}.project_k.weight"].T
        value = memory @ self.tensors[f"{name}.project_v.weight"].T
        if ".self_att." in name and "project_q_lora.0.lora_A" in self.tensors:
            end = "" if "encoder" in name else "_dec"
            query = query + self.low_rank(f"project_q_lora{end}.{layer}", x)
            value = value + self.low_rank(f"project_v_lora{end}.{layer}", x)
        heads = []
        for head in range(self.sizes.heads):
            part = slice(head * self.sizes.head_width, (head + 1) * self.sizes.head_width)
            scores = query[..., part] @ key[..., part].transpose(1, 2)  # T5 does not divide by a root
            if bias is not None:
                scores = scores + bias[head]
            shares = torch.softmax(scores.masked_fill(~allowed, -1e30), dim=-1).masked_fill(~allowed, 0.0)
            heads.append(shares @ value[..., part])
        return torch.cat(heads, dim=-1) @ self.tensors[f"{name}.attention_out.weight"].T

    def low_rank(self, name: str, x: Tensor) -> Tensor:
        inner = x @ self.tensors[f"{name}.lora_A"].T
        return LORA_SCALING * (inner @ self.tensors[f"{name}.lora_B"].T)

    def position_bias(self, stack: str, queries: int, keys: int) -> Tensor:
        """[heads, queries, keys] from the table [buckets, heads]."""
        table = self.tensors[f"t5.position_bias_{stack}.relative_attention_bias"]
        rows = [[table[self.bucket(q - key, stack == "enc")] for key in range(keys)] for q in range(queries)]
        return torch.stack([torch.stack(row) for row in rows]).permute(2, 0, 1)

    def bucket(self, distance: int, both_ways: bool) -> int:
        """``distance`` = query - key: half of the buckets are single steps, half logarithmic ones."""
        buckets = self.sizes.buckets // 2 if both_ways else self.sizes.buckets
        exact, far = buckets // 2, abs(distance)
        if far < exact:
            row = far
        else:
            log = math.log(far / exact) / math.log(self.sizes.max_distance / exact)
            row = exact + int(min(max(log, 0.0), 0.9999) * (buckets - exact))
        if distance < 0:
            return row + buckets if both_ways else 0
        return row


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """No mean, no bias."""
    return x * torch.rsqrt((x * x).mean(dim=-1, keepdim=True) + EPSILON) * weight


# --- files of the official layout ----------------------------------------------------------------------------------


def random_t5(sizes: Sizes, seed: int = 0) -> Tensors:
    """A random backbone under ``t5.``, fp64, at ModelCenter's scale; every tensor moves the output noticeably."""
    draw = _Draw(seed)
    inner = sizes.heads * sizes.head_width
    tensors = {"t5.input_embedding.weight": draw(sizes.vocab, sizes.hidden, std=0.01)}
    for stack, short in (("encoder", "enc"), ("decoder", "dec")):
        tensors[f"t5.position_bias_{short}.relative_attention_bias"] = draw(sizes.buckets, sizes.heads, std=1.0)
        tensors[f"t5.{stack}.output_layernorm.weight"] = draw.gain(sizes.hidden)
        for layer in range(sizes.layers):
            name = f"t5.{stack}.layers.{layer}"
            for part in ("self_att", "cross_att") if stack == "decoder" else ("self_att",):
                tensors[f"{name}.{part}.layernorm_before_attention.weight"] = draw.gain(sizes.hidden)
                for letter in "qkv":
                    std = 1.5 * (sizes.hidden * sizes.head_width**0.5) ** -0.5
                    matrix = draw(inner, sizes.hidden, std=std)
                    tensors[f"{name}.{part}.self_attention.project_{letter}.weight"] = matrix
                out = draw(sizes.hidden, inner, std=0.01 * inner**-0.5)
                tensors[f"{name}.{part}.self_attention.attention_out.weight"] = out
            tensors[f"{name}.ffn.layernorm_before_ffn.weight"] = draw.gain(sizes.hidden)
            tensors[f"{name}.ffn.ffn.w_in.w.weight"] = draw(sizes.wide, sizes.hidden, std=0.1 * sizes.hidden**-0.5)
            tensors[f"{name}.ffn.ffn.w_out.weight"] = draw(sizes.hidden, sizes.wide, std=0.2 * sizes.wide**-0.5)
    return tensors


def random_plugins(sizes: Sizes, ratio: int, seed: int = 0) -> Tensors:
    """Random plugins for a stream of 1/100: what reads u is large, what writes into the stream is small."""
    draw = _Draw(1000 * ratio + seed)
    hidden, width, tensors = sizes.hidden, sizes.width, {}
    for layer in range(sizes.layers):
        name = f"mux_layer.{layer}"
        tensors[f"{name}.mux_layer.weight"] = draw(ratio, ratio * hidden, std=(2 / (ratio * hidden)) ** 0.5)
        tensors[f"{name}.mux_layer.bias"] = draw(ratio, std=0.5)
        reads_u = draw(width, hidden, std=40 * hidden**-0.5)
        reads_x = draw(width, hidden, std=0.5 * hidden**-0.5)
        tensors[f"{name}.demux_adapter.w_in.weight"] = torch.cat([reads_u, reads_x], dim=1)
        tensors[f"{name}.demux_adapter.w_in.bias"] = draw(width, std=0.3)
        tensors[f"{name}.demux_adapter.w_out.weight"] = draw(hidden, width, std=0.01 * width**-0.5)
        tensors[f"{name}.demux_adapter.w_out.bias"] = draw(hidden, std=0.005)
    return tensors


def random_lora(sizes: Sizes, seed: int = 0) -> Tensors:
    """Updates of the q and v projections of every self-attention, as large as the matrices themselves."""
    draw = _Draw(77 + seed)
    inner, tensors = sizes.heads * sizes.head_width, {}
    for kind in ("project_q_lora", "project_v_lora", "project_q_lora_dec", "project_v_lora_dec"):
        for layer in range(sizes.layers):
            tensors[f"{kind}.{layer}.lora_A"] = draw(LORA_RANK, sizes.hidden, std=sizes.hidden**-0.5)
            tensors[f"{kind}.{layer}.lora_B"] = draw(inner, LORA_RANK, std=0.1)
    return tensors


class _Draw:
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int, std: float) -> Tensor:
        return std * torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def gain(self, *shape: int) -> Tensor:
        return 1 + self(*shape, std=0.2)


def modelcenter_from_t5(state: Tensors) -> Tensors:
    """A Hugging Face T5 of the original kind in ModelCenter's form under ``t5.``, fp64: the stream at 1/100."""
    out = {"t5.input_embedding.weight": state["shared.weight"].double() / 100}
    for stack, short in (("encoder", "enc"), ("decoder", "dec")):
        blocks = {int(name.split(".")[2]) for name in state if name.startswith(f"{stack}.block.")}
        table = state[f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
        out[f"t5.position_bias_{short}.relative_attention_bias"] = table.double()
        out[f"t5.{stack}.output_layernorm.weight"] = state[f"{stack}.final_layer_norm.weight"].double()
        for i in sorted(blocks):
            there, here = f"{stack}.block.{i}.layer", f"t5.{stack}.layers.{i}"
            parts = [("self_att", "0", "SelfAttention")]
            parts += [("cross_att", "1", "EncDecAttention")] if stack == "decoder" else []
            for part, number, kind in parts:
                gain = state[f"{there}.{number}.layer_norm.weight"].double()
                out[f"{here}.{part}.layernorm_before_attention.weight"] = gain
                for letter in "qkv":
                    matrix = state[f"{there}.{number}.{kind}.{letter}.weight"].double()
                    out[f"{here}.{part}.self_attention.project_{letter}.weight"] = matrix
                matrix = state[f"{there}.{number}.{kind}.o.weight"].double() / 100
                out[f"{here}.{part}.self_attention.attention_out.weight"] = matrix
            last = f"{there}.{len(parts)}"
            out[f"{here}.ffn.layernorm_before_ffn.weight"] = state[f"{last}.layer_norm.weight"].double()
            out[f"{here}.ffn.ffn.w_in.w.weight"] = state[f"{last}.DenseReluDense.wi.weight"].double() / 10
            out[f"{here}.ffn.ffn.w_out.weight"] = state[f"{last}.DenseReluDense.wo.weight"].double() / 10
    return out


def as_stored(tensors: Tensors) -> Tensors:
    """Rounded to fp16 as in a file, and back: the numbers that file and arithmetic share."""
    return {name: tensor.half().double() for name, tensor in tensors.items()}


def write(path: Path, *groups: Tensors) -> Path:
    """A file as the official code writes it: one flat dict of fp16 tensors."""
    torch.save({name: tensor.half() for group in groups for name, tensor in group.items()}, path)
    return path
