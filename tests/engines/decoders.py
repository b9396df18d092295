"""A family of decoders, made by hand: a tiny GPT-2 whose layers are one, named and shaped as in ``docs/bundle.md``.

Ratio 1 is the model itself; others take fewer, larger steps, in block form. Letters as in ``engines.generate``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.bundle import Bundle
from engines.manifest import (
    DECODER,
    GENERATION,
    PAST,
    PRESENT,
    Cost,
    Generation,
    TensorSpec,
    Tokenizer,
    cache_name,
)
from tests.engines import toys

if TYPE_CHECKING:
    from transformers import GPT2LMHeadModel

H, HEADS, LAYERS, POSITIONS = 16, 2, 4, 48
V, EOS, PAD = 257, 256, 256
WIDTH = H // HEADS
NAMES = {1: "ode-r1-fp32", 2: "ode-r2-fp32", 4: "ode-r4-fp32"}


@cache
def model() -> GPT2LMHeadModel:
    """The same one in every test of a process: weights large enough that answers differ from text to text."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {"n_embd": H, "n_head": HEADS, "n_layer": LAYERS, "n_positions": POSITIONS, "vocab_size": V}
    config = GPT2Config(**sizes, bos_token_id=EOS, eos_token_id=EOS, initializer_range=0.4)
    made = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    # Equal ones, and not one module: transformers keeps its cache by the number that a layer has.
    for layer in made.transformer.h[1:]:
        layer.load_state_dict(made.transformer.h[0].state_dict())
    made.generation_config.pad_token_id = PAD
    return made


class _Nodes:
    """``nodes.MatMul(a, b)`` adds a node and returns its output's name; arrays become initialisers."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: dict[str, np.ndarray] = {}

    def __getattr__(self, kind: str) -> Any:
        def add(*inputs: Any, outputs: int = 1, name: str | None = None, **attributes: Any) -> Any:
            names = [f"{kind}_{len(self.nodes)}_{i}" for i in range(outputs)] if name is None else [name]
            given = [self.constant(one) for one in inputs]
            self.nodes.append(helper.make_node(kind, given, names, **attributes))
            return names if outputs > 1 else names[0]

        return add

    def constant(self, value: Any) -> str:
        if isinstance(value, str):
            return value
        array = np.asarray(value)
        name = f"c{hashlib.sha256(array.tobytes() + str((array.dtype, array.shape)).encode()).hexdigest()[:12]}"
        self.tensors[name] = array
        return name


def decoder(steps: Sequence[float], kept: str = "float32") -> onnx.ModelProto:
    """``steps``: their sizes; of size 1, the layer as it is. ``kept``: the type of what is kept of each."""
    w = {name: value.detach().numpy() for name, value in model().state_dict().items()}
    o = _Nodes()
    h = o.Add(o.Gather(w["transformer.wte.weight"], "input_ids"), o.Gather(w["transformer.wpe.weight"], "position_ids"))
    allowed = _allowed(o)
    for step, size in enumerate(steps):
        done = _layer(o, w, h, allowed, step, kept)
        if size != 1:
            done = o.Add(o.Mul(h, np.float32(1 - size)), o.Mul(done, np.float32(size)))
        h = done
    last = o.LayerNormalization(h, w["transformer.ln_f.weight"], w["transformer.ln_f.bias"], epsilon=1e-5)
    o.MatMul(last, np.ascontiguousarray(w["transformer.wte.weight"].T), name="logits")
    inputs = [_spec("input_ids", "int64", "batch", "sequence"), _spec("attention_mask", "int64", "batch", "total")]
    inputs.append(_spec("position_ids", "int64", "batch", "sequence"))
    outputs = [_spec("logits", "float32", "batch", "sequence", V)]
    for step in range(len(steps)):
        for kind in ("key", "value"):
            inputs.append(_spec(cache_name(PAST, step, kind), kept, "batch", HEADS, "past", WIDTH))
            outputs.append(_spec(cache_name(PRESENT, step, kind), kept, "batch", HEADS, "total", WIDTH))
    graph = helper.make_graph(
        o.nodes,
        "decoder",
        [toys.info(spec) for spec in inputs],
        [toys.info(spec) for spec in outputs],
        [numpy_helper.from_array(value, name) for name, value in o.tensors.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(made, full_check=True)
    return made


def _allowed(o: _Nodes) -> str:
    """[B, 1, S, T]: whether a token may look at another: not a later one, none where the mask is 0."""
    total = o.Squeeze(o.Shape("attention_mask", start=1), np.array([0]))
    count = o.Squeeze(o.Shape("input_ids", start=1), np.array([0]))
    columns = o.Range(np.int64(0), total, np.int64(1))
    rows = o.Range(o.Sub(total, count), total, np.int64(1))
    causal = o.LessOrEqual(o.Unsqueeze(columns, np.array([0])), o.Unsqueeze(rows, np.array([1])))
    there = o.Unsqueeze(o.Cast("attention_mask", to=TensorProto.BOOL), np.array([1, 2]))
    return str(o.And(o.Unsqueeze(causal, np.array([0, 1])), there))


def _layer(o: _Nodes, w: dict[str, np.ndarray], h: str, allowed: str, step: int, kept: str) -> str:
    def linear(x: str, name: str) -> str:
        product = o.MatMul(x, w[f"transformer.h.0.{name}.weight"])
        return str(o.Add(product, w[f"transformer.h.0.{name}.bias"]))

    def norm(x: str, name: str) -> str:
        scale, bias = (w[f"transformer.h.0.{name}.{kind}"] for kind in ("weight", "bias"))
        return str(o.LayerNormalization(x, scale, bias, epsilon=1e-5))

    def heads(x: str) -> str:
        return str(o.Transpose(o.Reshape(x, np.array([0, 0, HEADS, WIDTH])), perm=[0, 2, 1, 3]))

    query, key, value = o.Split(linear(norm(h, "ln_1"), "attn.c_attn"), axis=2, num_outputs=3, outputs=3)

    def grown(kind: Any, one: str) -> str:
        past, present = cache_name(PAST, step, kind), cache_name(PRESENT, step, kind)
        if kept == "float32":
            return str(o.Concat(past, heads(one), axis=2, name=present))
        whole = o.Concat(o.Cast(past, to=TensorProto.FLOAT), heads(one), axis=2)
        return str(o.Cast(o.Cast(whole, to=toys.DTYPES[kept], name=present), to=TensorProto.FLOAT))

    key, value = grown("key", key), grown("value", value)
    scores = o.Div(o.MatMul(heads(query), o.Transpose(key, perm=[0, 1, 3, 2])), np.float32(WIDTH**0.5))
    shares = o.Softmax(o.Where(allowed, scores, np.float32(-1e9)), axis=-1)
    mixed = o.Reshape(o.Transpose(o.MatMul(shares, value), perm=[0, 2, 1, 3]), np.array([0, 0, H]))
    h = o.Add(h, linear(mixed, "attn.c_proj"))
    inner = linear(norm(h, "ln_2"), "mlp.c_fc")
    cubed = o.Mul(o.Mul(o.Mul(inner, inner), inner), np.float32(0.044715))
    squashed = o.Tanh(o.Mul(o.Add(inner, cubed), np.float32((2 / np.pi) ** 0.5)))
    gelu = o.Mul(o.Mul(inner, np.float32(0.5)), o.Add(squashed, np.float32(1)))
    return str(o.Add(h, linear(gelu, "mlp.c_proj")))


def _spec(name: str, dtype: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=list(shape))


def save_tokenizer(folder: Path) -> None:
    """GPT-2's, with no merges: a token for every byte, and one for the end of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def make_bundle(folder: Path, ratios: Sequence[int] = (1, 2, 4), kept: str = "float32") -> Bundle:
    """The ratios into ``folder``, with engines. ``kept``: the type of what is kept of a text."""
    graphs, variants = {}, {}
    for ratio in ratios:
        name, steps = f"ode-r{ratio}", [float(ratio)] * (LAYERS // ratio)
        cost = Cost(per_token=12 * H * H * len(steps) + H * V, per_pair=2 * H * len(steps))
        graphs[name] = (decoder(steps, kept), cost)
        variants[NAMES[ratio]] = toys.variant("ode", ratio, {DECODER: name}, steps=[steps])
    inputs = ["input_ids", "attention_mask"]
    return toys.make_bundle(
        folder,
        graphs,
        variants,
        model_type="gpt2",
        layers=LAYERS,
        hidden_size=H,
        tokenizer=Tokenizer(path="tokenizer.json", max_length=POSITIONS, pad_id=PAD, inputs=inputs),
        save_tokenizer=save_tokenizer,
        method="ode",
        task=GENERATION,
        generation=Generation(eos_ids=[EOS], bos_id=EOS, pad_id=PAD, max_positions=POSITIONS),
    )


def prompts(batch: int, longest: int = 9, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random prompts of random lengths, ids and mask [B, S], padded on the left."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, batch)
    mask = (np.arange(lengths.max())[::-1] < lengths[:, None]).astype(np.int64)
    return np.where(mask == 1, random.integers(0, 256, mask.shape), PAD), mask
