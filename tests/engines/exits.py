"""A family with exits, made by hand: tiny graphs with the names and shapes of ``docs/bundle.md``, real engines.

A layer adds to every token a mix of the text's mean, so that padding changes nothing. Letters: B, S, H, C as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from engines.bundle import Bundle
from engines.manifest import (
    ALL_EXITS,
    ENCODER,
    EXIT_OUTPUTS,
    HIDDEN,
    PREVIOUS,
    ROWS,
    Cost,
    TensorSpec,
    Tokenizer,
    segment_role,
)
from tests.engines import toys
from tests.engines.test_text import ALL_INPUTS, save_tokenizer

H, C, V, LAYERS = 8, 3, 128, 6
EXITS = (2, 4, 6)
LABELS = ["bad", "fair", "good"]
NAMES = {1.0: "costeff-r1-fp32", 4.0: "costeff-r4-fp32"}

Nodes = list[onnx.NodeProto]


class Weights:
    """Random, but the same for all graphs of a ratio; the head of ``broken`` (a layer) is NaN."""

    def __init__(self, ratio: float, broken: int | None = None) -> None:
        random = np.random.default_rng(int(ratio))
        self.table = random.normal(size=(V, H)).astype(np.float32)
        # Small enough that rounding does not grow from layer to layer.
        self.mix = (random.normal(size=(LAYERS, H, H)) / H**0.5).astype(np.float32)
        # Heads of deeper layers are surer, as a trained model's are.
        sure = np.linspace(0.5, 4.0, LAYERS)[:, None, None]
        self.head = (random.normal(size=(1, H, C)) * sure + random.normal(size=(LAYERS, H, C)) * 0.3).astype(np.float32)
        if broken is not None:
            self.head[broken - 1] = np.nan


def _layers(first: int, last: int) -> Nodes:
    """``h{first}`` -> ``h{last}``, layers counted from 0."""
    nodes = [
        helper.make_node("Cast", ["kept_mask"], ["mask"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["mask", "two"], ["mask3"]),
        helper.make_node("ReduceSum", ["mask3", "one"], ["count"], keepdims=1),
    ]
    for layer in range(first, last):
        nodes += [
            helper.make_node("Mul", [f"h{layer}", "mask3"], [f"own{layer}"]),
            helper.make_node("ReduceSum", [f"own{layer}", "one"], [f"sum{layer}"], keepdims=1),
            helper.make_node("Div", [f"sum{layer}", "count"], [f"mean{layer}"]),
            helper.make_node("MatMul", [f"mean{layer}", f"mix{layer}"], [f"mixed{layer}"]),
            helper.make_node("Add", [f"h{layer}", f"mixed{layer}"], [f"added{layer}"]),
            helper.make_node("Tanh", [f"added{layer}"], [f"h{layer + 1}"]),
        ]
    return nodes


def _exit(layer: int, names: Sequence[str]) -> Nodes:
    """``h{layer}`` -> the four outputs of the exit after so many layers."""
    logits, entropy, most, margin = names
    at = str(layer)
    return [
        helper.make_node("Gather", [f"h{layer}", "first"], ["cls" + at], axis=1),
        helper.make_node("MatMul", ["cls" + at, f"head{layer - 1}"], [logits]),
        helper.make_node("LogSoftmax", [logits], ["log" + at], axis=-1),
        helper.make_node("Exp", ["log" + at], ["p" + at]),
        helper.make_node("Mul", ["p" + at, "log" + at], ["plog" + at]),
        helper.make_node("ReduceSum", ["plog" + at, "one"], ["minus" + at], keepdims=0),
        helper.make_node("Neg", ["minus" + at], [entropy]),
        helper.make_node("ReduceMax", ["p" + at, "one"], [most], keepdims=0),
        helper.make_node("TopK", ["p" + at, "best_two"], ["top" + at, "which" + at]),
        helper.make_node("Split", ["top" + at], ["most" + at, "next" + at], axis=1, num_outputs=2),
        helper.make_node("Sub", ["most" + at, "next" + at], ["gap" + at]),
        helper.make_node("Squeeze", ["gap" + at, "one"], [margin]),
    ]


def _embed() -> Nodes:
    return [
        helper.make_node("Gather", ["table", "input_ids"], ["words"]),
        helper.make_node("Cast", ["token_type_ids"], ["types"], to=TensorProto.FLOAT),
        helper.make_node("Unsqueeze", ["types", "two"], ["types3"]),
        helper.make_node("Add", ["words", "types3"], ["h0"]),
        helper.make_node("Identity", ["attention_mask"], ["kept_mask"]),
    ]


def segment(weights: Weights, first: int, last: int) -> onnx.ModelProto:
    """Layers ``first`` (from 0) up to the exit at ``last``."""
    ids = [TensorSpec(name=name, dtype="int64", shape=["batch", "sequence"]) for name in ALL_INPUTS]
    later = [
        TensorSpec(name=PREVIOUS, dtype="float32", shape=["batch", "sequence", H]),
        TensorSpec(name="attention_mask", dtype="int64", shape=["batch", "sequence"]),
        TensorSpec(name=ROWS, dtype="int64", shape=["kept"]),
    ]
    rows = "kept" if first else "batch"
    outputs = [_output("logits", rows, C), *(_output(name, rows) for name in EXIT_OUTPUTS[1:])]
    nodes = _embed()
    if first:
        nodes = [
            helper.make_node("Gather", [PREVIOUS, ROWS], [f"h{first}"], axis=0),
            helper.make_node("Gather", ["attention_mask", ROWS], ["kept_mask"], axis=0),
        ]
    nodes += [*_layers(first, last), *_exit(last, EXIT_OUTPUTS)]
    if last < LAYERS:
        nodes.append(helper.make_node("Identity", [f"h{last}"], [HIDDEN]))
        outputs.insert(0, _output(HIDDEN, rows, "sequence", H))
    return _model(weights, nodes, later if first else ids, outputs)


def encoder(weights: Weights) -> onnx.ModelProto:
    """All layers, and of the last exit its logits alone."""
    ids = [TensorSpec(name=name, dtype="int64", shape=["batch", "sequence"]) for name in ALL_INPUTS]
    nodes = [*_embed(), *_layers(0, LAYERS), *_exit(LAYERS, EXIT_OUTPUTS)]
    return _model(weights, nodes, ids, [_output("logits", "batch", C)])


def all_exits(weights: Weights) -> onnx.ModelProto:
    """The four outputs of every layer, [B, L, ...]."""
    ids = [TensorSpec(name=name, dtype="int64", shape=["batch", "sequence"]) for name in ALL_INPUTS]
    nodes = [*_embed(), *_layers(0, LAYERS)]
    for layer in range(1, LAYERS + 1):
        nodes += _exit(layer, [f"{name}{layer}" for name in EXIT_OUTPUTS])
    for name in EXIT_OUTPUTS:
        each = [f"{name}_{layer}" for layer in range(1, LAYERS + 1)]
        nodes += [helper.make_node("Unsqueeze", [f"{name}{i + 1}", "one"], [one]) for i, one in enumerate(each)]
        nodes.append(helper.make_node("Concat", each, [name], axis=1))
    outputs = [_output("logits", "batch", LAYERS, C), *(_output(n, "batch", LAYERS) for n in EXIT_OUTPUTS[1:])]
    return _model(weights, nodes, ids, outputs)


def _output(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name=name, dtype="float32", shape=list(shape))


def _model(weights: Weights, nodes: Nodes, inputs: list[TensorSpec], outputs: list[TensorSpec]) -> onnx.ModelProto:
    constants = {"one": [1], "two": [2], "best_two": [2], "first": 0}
    tensors = {name: np.array(value, np.int64) for name, value in constants.items()}
    tensors |= {"table": weights.table}
    tensors |= {f"mix{i}": weights.mix[i] for i in range(LAYERS)} | {f"head{i}": weights.head[i] for i in range(LAYERS)}
    used = {name for node in nodes for name in node.input}
    graph = helper.make_graph(
        nodes,
        "exits",
        [toys.info(spec) for spec in inputs],
        [toys.info(spec) for spec in outputs],
        [numpy_helper.from_array(value, name) for name, value in tensors.items() if name in used],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def make_bundle(
    folder: Path, exits: Sequence[int] = EXITS, broken: int | None = None, plain_backbone: bool = False
) -> Bundle:
    """Ratios 1 and 4 into ``folder``, both with exits, or ratio 1 without (``plain_backbone``).

    ``broken``: the layer whose exit returns NaN.
    """
    graphs: dict[str, tuple[onnx.ModelProto, Cost]] = {}
    variants = {}
    for ratio, name in NAMES.items():
        weights = Weights(ratio, broken)
        plain = plain_backbone and ratio == 1
        spans = [(0, LAYERS)] if plain else _spans(exits)
        models = {segment_role(i): segment(weights, a, b) for i, (a, b) in enumerate(spans)}
        models = {ENCODER: encoder(weights)} if plain else {**models, ALL_EXITS: all_exits(weights)}
        costs = [Cost(per_token=int(1200 / ratio) * (b - a), fixed=C * H) for a, b in spans]
        roles = {role: f"costeff-r{ratio:g}-{role}" for role in models}
        graphs |= dict(zip(roles.values(), zip(models.values(), [*costs, Cost()], strict=False), strict=True))
        variants[name] = toys.variant("costeff", ratio, roles, exits=None if plain else list(exits))
    return toys.make_bundle(
        folder,
        graphs,
        variants,
        model_type="bert",
        layers=LAYERS,
        hidden_size=H,
        tokenizer=Tokenizer(path="tokenizer.json", max_length=16, pad_id=0, inputs=ALL_INPUTS),
        save_tokenizer=save_tokenizer,
        method="costeff",
        task="sequence-classification",
        labels=LABELS,
    )


def _spans(exits: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip((0, *exits[:-1]), exits, strict=True))


def feeds(batch: int, seed: int = 0, longest: int = 12) -> dict[str, np.ndarray]:
    """Texts of random words and lengths, padded."""
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest + 1, batch)
    mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
    ids = random.integers(4, V - 4, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def row(found: dict[str, np.ndarray], index: int) -> dict[str, np.ndarray]:
    """One text of ``feeds`` alone, without its padding."""
    length = int(found["attention_mask"][index].sum())
    return {name: values[index : index + 1, :length] for name, values in found.items()}
