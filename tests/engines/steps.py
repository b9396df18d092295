"""Step engines, made by hand: tiny graphs with the names and shapes of ``docs/bundle.md``, and what they compute.

Two groups, each a layer that adds to every token a mix of the text's mean, so that padding changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, parser

from engines.bundle import Bundle
from engines.manifest import (
    EMBED,
    HEAD,
    Cost,
    Tokenizer,
    head_role,
    step_role,
)
from tests.engines import toys
from tests.engines.test_text import ALL_INPUTS, save_tokenizer

H, C, V = 8, 3, 128
STEPS = {1: [[1.0, 1.0], [1.0, 1.0]], 2: [[2.0], [2.0]]}
EXITS = {1: [1, 3, 4], 2: [1, 2]}
NAMES = {ratio: f"ode-r{ratio}-step-fp32" for ratio in STEPS}
LABELS = ["bad", "fair", "good"]

_random = np.random.default_rng(0)
TABLE = _random.normal(size=(V, H)).astype(np.float32)
MIX = (_random.normal(size=(2, H, H)) / H**0.5).astype(np.float32)
HEADS = {role: _random.normal(size=(H, C)).astype(np.float32) * 2 for role in (HEAD, *map(head_role, range(1, 5)))}

_EMBED = """<ir_version: 10, opset_import: ["": 18]>
embed (int64[batch, sequence] input_ids, int64[batch, sequence] token_type_ids)
    => (float[batch, sequence, 8] hidden) {
    words = Gather (table, input_ids)
    types = Cast <to = 1> (token_type_ids)
    two = Constant <value_ints = [2]> ()
    types3 = Unsqueeze (types, two)
    hidden = Add (words, types3)
}"""

_MEAN = """
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    mask = Cast <to = 1> (attention_mask)
    mask3 = Unsqueeze (mask, two)
    count = ReduceSum <keepdims = 1> (mask3, one)
    own = Mul (previous, mask3)
    total = ReduceSum <keepdims = 1> (own, one)
    mean = Div (total, count)
"""

_STEP = f"""<ir_version: 10, opset_import: ["": 18]>
step (float[batch, sequence, 8] previous, int64[batch, sequence] attention_mask, float[1] dt)
    => (float[batch, sequence, 8] hidden) {{{_MEAN}
    mixed = MatMul (mean, mix)
    added = Add (previous, mixed)
    done = Tanh (added)
    unit = Constant <value_floats = [1.0]> ()
    rest = Sub (unit, dt)
    kept = Mul (previous, rest)
    moved = Mul (done, dt)
    hidden = Add (kept, moved)
}}"""

_HEAD = f"""<ir_version: 10, opset_import: ["": 18]>
head (float[batch, sequence, 8] previous, int64[batch, sequence] attention_mask)
    => (float[batch, 3] logits, float[batch] entropy, float[batch] max_probability, float[batch] margin) {{{_MEAN}
    flat = Squeeze (mean, one)
    logits = MatMul (flat, head)
    log = LogSoftmax <axis = -1> (logits)
    p = Exp (log)
    plog = Mul (p, log)
    minus = ReduceSum <keepdims = 0> (plog, one)
    entropy = Neg (minus)
    max_probability = ReduceMax <keepdims = 0> (p, one)
    top, which = TopK (p, two)
    most, next = Split <axis = 1, num_outputs = 2> (top)
    gap = Sub (most, next)
    margin = Squeeze (gap, one)
}}"""


def _model(text: str, **tensors: np.ndarray) -> onnx.ModelProto:
    made = parser.parse_model(text)
    made.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in tensors.items())
    onnx.checker.check_model(made, full_check=True)
    return made


def _plain_head(made: onnx.ModelProto) -> onnx.ModelProto:
    """The logits alone."""
    nodes = [node for node in made.graph.node if node.output[0] in {"one", "two", "mask", "mask3", "count"}]
    nodes += [node for node in made.graph.node if node.output[0] in {"own", "total", "mean", "flat", "logits"}]
    graph = helper.make_graph(
        nodes, "head", made.graph.input, made.graph.output[:1], initializer=list(made.graph.initializer)
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def reference(feeds: Mapping[str, np.ndarray], ratio: int) -> list[np.ndarray]:
    """The mean hidden state [B, H] after every step, in numpy."""
    mask = feeds["attention_mask"].astype(np.float32)[..., None]
    h = TABLE[feeds["input_ids"]] + feeds["token_type_ids"].astype(np.float32)[..., None]
    found = []
    for group, sizes in enumerate(STEPS[ratio]):
        for size in sizes:
            mean = (h * mask).sum(1, keepdims=True) / mask.sum(1, keepdims=True)
            h = (1 - size) * h + size * np.tanh(h + mean @ MIX[group])
            found.append(((h * mask).sum(1) / mask.sum(1)).astype(np.float32))
    return found


def make_bundle(folder: Path, *, with_exits: bool) -> Bundle:
    """Both ratios into ``folder``, with engines."""
    models = {EMBED: (_model(_EMBED, table=TABLE), Cost())}
    models |= {step_role(group, 2): (_model(_STEP, mix=MIX[group]), Cost(per_token=1000)) for group in range(2)}
    for role, weight in HEADS.items():
        made = _model(_HEAD, head=weight)
        models[role] = (made if role != HEAD else _plain_head(made), Cost(fixed=C * H))
    variants = {}
    for ratio, steps in STEPS.items():
        exits = EXITS[ratio] if with_exits else None
        roles = [EMBED, *(step_role(group, 2) for group in range(2)), HEAD, *map(head_role, exits or ())]
        graphs = {role: f"ode-{role}" for role in roles}
        variants[NAMES[ratio]] = toys.variant("ode", ratio, graphs, exits=exits, steps=steps)
    return toys.make_bundle(
        folder,
        {f"ode-{role}": made for role, made in models.items()},
        variants,
        model_type="albert",
        layers=4,
        hidden_size=H,
        tokenizer=Tokenizer(path="tokenizer.json", max_length=16, pad_id=0, inputs=ALL_INPUTS),
        save_tokenizer=save_tokenizer,
        method="ode",
        task="sequence-classification",
        labels=LABELS,
    )
