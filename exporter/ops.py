"""The custom operators of domain ``compexport``: declared once here, for PyTorch, ONNX and every backend.

Each :class:`Op` holds an eager reference in plain PyTorch (differentiable: training uses it), a ``torch.library``
operator that keeps it a single node while a model is traced, an ONNX schema, and a function body of standard
operators that travels in the file, so that a runtime that has never heard of the operator can run it.

Letters: B batch, S sequence length, H hidden size, k ratio, m = ceil(S / k) groups, r adapter width.
Source of the arithmetic: Variator (arXiv 2310.15724), section 1a of its official code; the masked form is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import onnx
import onnx.defs
import onnx.parser
import torch
import torch.nn.functional as F
from torch import Tensor

from exporter.precision import wide

DOMAIN = "compexport"
VERSION = 1
BODY_OPSET = 20

# Logit of a padded position. Large enough that its softmax weight is exactly 0, small enough for fp16.
MASKED_LOGIT = -1e4


def token_merge(x: Tensor, weight: Tensor, bias: Tensor, ratio: int) -> Tensor:
    """Merge each group of ``ratio`` consecutive tokens into one, by softmax weights computed from the whole group.

    x [B,S,H], weight [k,k*H], bias [k] -> [B,m,H]. The last group is completed with zero vectors, which take part
    in its softmax like any token (the behaviour of the official code on padded input).
    """
    groups = _groups(x, ratio)
    logits = F.linear(groups.flatten(2), weight, bias)
    return torch.matmul(_shares(logits).unsqueeze(2), groups).squeeze(2)


def masked_token_merge(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, ratio: int) -> Tensor:
    """Like :func:`token_merge`, but positions with mask 0 neither influence nor enter their group's vector.

    x [B,S,H], mask [B,S] of 0 and 1 in x's dtype, weight [k,k*H], bias [k] -> [B,m,H]. A group without any token
    gives the zero vector, never NaN.
    """
    groups = _groups(x * mask.unsqueeze(-1), ratio)
    keep = _groups(mask.unsqueeze(-1), ratio).squeeze(-1)
    logits = F.linear(groups.flatten(2), weight, bias)
    weights = _shares(torch.where(keep > 0.5, logits, MASKED_LOGIT)) * keep
    return torch.matmul(weights.unsqueeze(2), groups).squeeze(2)


def _shares(logits: Tensor) -> Tensor:
    """Softmax weights, computed in fp32 at least."""
    return wide(logits).softmax(-1).to(logits.dtype)


def token_split(y: Tensor, x: Tensor, down_w: Tensor, down_b: Tensor, up_w: Tensor, up_b: Tensor, ratio: int) -> Tensor:
    """Give every token its group's vector plus a low-rank correction that depends on the token itself.

    y [B,m,H], x [B,S,H], down_w [r,2H], down_b [r], up_w [H,r], up_b [H] -> [B,S,H], namely
    ``u + up(tanh(down([u; x])))`` with u = y repeated k times. The half of ``down`` that acts on u is constant inside
    a group, so it is applied before repeating.
    """
    length, hidden = x.shape[1], x.shape[2]
    from_group = F.linear(y, down_w[:, :hidden], down_b).unsqueeze(2)
    from_token = _groups(F.linear(x, down_w[:, hidden:]), ratio)
    correction = F.linear(torch.tanh(from_token + from_group), up_w)
    return ((y + up_b).unsqueeze(2) + correction).flatten(1, 2)[:, :length].contiguous()


def _groups(x: Tensor, ratio: int) -> Tensor:
    """[B,S,C] -> [B,m,k,C], zeros appended to the last group."""
    missing = -x.shape[1] % ratio
    return F.pad(x, (0, 0, 0, missing)).unflatten(1, (-1, ratio))


@dataclass(frozen=True)
class Op:
    """One custom operator: its ONNX signature, its eager reference, its function body."""

    name: str
    inputs: tuple[str, ...]
    output: str
    reference: Callable[..., Tensor]
    fake: Callable[..., Tensor]
    body: str

    @property
    def torch_name(self) -> str:
        snake = "".join("_" + c.lower() if c.isupper() else c for c in self.name)
        return f"{DOMAIN}::{snake.lstrip('_')}"

    @property
    def function(self) -> onnx.FunctionProto:
        """The ONNX function body, over standard operators of opset ``BODY_OPSET``."""
        header = f'<domain: "{DOMAIN}", opset_import: ["": {BODY_OPSET}]>'
        signature = f"{self.name} <ratio> ({', '.join(self.inputs)}) => ({self.output})"
        return onnx.parser.parse_function(f"{header}\n{signature}\n{{{self.body}}}")

    @property
    def schema(self) -> onnx.defs.OpSchema:
        """The ONNX schema; all tensors share one floating-point type."""
        parameter, attribute = onnx.defs.OpSchema.FormalParameter, onnx.defs.OpSchema.Attribute
        kinds = onnx.defs.OpSchema.AttrType
        return onnx.defs.OpSchema(
            self.name,
            DOMAIN,
            VERSION,
            doc=self.reference.__doc__ or "",
            inputs=[parameter(name, "T") for name in self.inputs],
            outputs=[parameter(self.output, "T")],
            type_constraints=[("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], "")],
            attributes=[
                attribute("ratio", kinds.INT, "group size k"),
                attribute("plugin_namespace", kinds.STRING, "where TensorRT looks for a plugin", required=False),
                attribute("plugin_version", kinds.STRING, "version of that plugin", required=False),
            ],
        )

    def __call__(self, *tensors: Tensor, ratio: int) -> Tensor:
        """Run the operator: the reference in eager mode, one opaque node while a model is being traced."""
        if torch.compiler.is_exporting():
            return _torch_op(self)(*tensors, ratio)
        return self.reference(*tensors, ratio)


def _merged_like(x: Tensor, *rest: Tensor | int) -> Tensor:
    ratio = rest[-1]
    assert isinstance(ratio, int)
    return x.new_empty((x.shape[0], (x.shape[1] + ratio - 1) // ratio, x.shape[2]))


def _split_like(y: Tensor, x: Tensor, *rest: Tensor | int) -> Tensor:
    return torch.empty_like(x)


# Shapes come from the mask or from constant weights where possible: those sub-graphs are equal in every layer, so a
# runtime's common-subexpression pass keeps one copy of them.
_MERGE_BODY = """
    k = Constant <value_int: int = @ratio> ()
    one = Constant <value_ints: ints = [1]> ()
    ratio = Reshape (k, one)
    length = Shape <start: int = 1, end: int = 2> ({lengths})
    negative = Neg (length)
    missing = Mod (negative, ratio)
    zero = Constant <value_ints: ints = [0]> ()
    zeros4 = Constant <value_ints: ints = [0, 0, 0, 0]> ()
    x_pads = Concat <axis: int = 0> (zeros4, missing, zero)
    keep_batch = Constant <value_ints: ints = [0, -1]> ()
    flat = Shape <start: int = 1, end: int = 2> (weight)
    minus1 = Constant <value_ints: ints = [-1]> ()
    flat_shape = Concat <axis: int = 0> (keep_batch, flat)
    group_shape = Concat <axis: int = 0> (keep_batch, ratio, minus1)
    {prepare}
    padded = Pad (tokens, x_pads)
    rows = Reshape (padded, flat_shape)
    columns = Transpose <perm: ints = [1, 0]> (weight)
    products = MatMul (rows, columns)
    logits = Add (products, bias)
    {normalise}
    axis2 = Constant <value_ints: ints = [2]> ()
    row_weights = Unsqueeze (weights, axis2)
    hidden = Div (flat, ratio)
    cells_shape = Concat <axis: int = 0> (keep_batch, ratio, hidden)
    cells = Reshape (padded, cells_shape)
    merged = MatMul (row_weights, cells)
    y = Squeeze (merged, axis2)
"""

# In fp32 whatever the type of the rest; runtimes drop a cast from fp32 to fp32.
_SHARES = """
    wide_logits = Cast <to: int = 1> ({logits})
    wide_shares = Softmax <axis: int = -1> (wide_logits)
    {weights} = CastLike (wide_shares, {logits})"""

_PLAIN = {
    "lengths": "x",
    "prepare": "tokens = Identity (x)",
    "normalise": _SHARES.format(logits="logits", weights="weights"),
}

_MASKED = {
    "lengths": "mask",
    "prepare": """
    last = Constant <value_ints: ints = [-1]> ()
    mask_column = Unsqueeze (mask, last)
    tokens = Mul (x, mask_column)
    zeros3 = Constant <value_ints: ints = [0, 0, 0]> ()
    mask_pads = Concat <axis: int = 0> (zeros3, missing)
    padded_mask = Pad (mask, mask_pads)
    mask_shape = Concat <axis: int = 0> (keep_batch, ratio)
    keep = Reshape (padded_mask, mask_shape)
    half = Constant <value_float: float = 0.5> ()
    half_like = CastLike (half, mask)
    real = Greater (keep, half_like)""",
    "normalise": """
    floor = Constant <value_float: float = -10000.0> ()
    floor_like = CastLike (floor, logits)
    masked = Where (real, logits, floor_like)
    """
    + _SHARES.format(logits="masked", weights="shares")
    + """
    weights = Mul (shares, keep)""",
}

_SPLIT_BODY = """
    k = Constant <value_int: int = @ratio> ()
    one = Constant <value_ints: ints = [1]> ()
    two = Constant <value_ints: ints = [2]> ()
    zero = Constant <value_ints: ints = [0]> ()
    ratio = Reshape (k, one)
    length = Shape <start: int = 1, end: int = 2> (x)
    negative = Neg (length)
    missing = Mod (negative, ratio)
    zeros4 = Constant <value_ints: ints = [0, 0, 0, 0]> ()
    pads = Concat <axis: int = 0> (zeros4, missing, zero)
    hidden = Shape <start: int = 0, end: int = 1> (up_w)
    both = Add (hidden, hidden)
    down_y = Slice (down_w, zero, hidden, one)
    down_x = Slice (down_w, hidden, both, one)
    down_y_columns = Transpose <perm: ints = [1, 0]> (down_y)
    down_x_columns = Transpose <perm: ints = [1, 0]> (down_x)
    up_columns = Transpose <perm: ints = [1, 0]> (up_w)
    group_product = MatMul (y, down_y_columns)
    group_part = Add (group_product, down_b)
    group_cells = Unsqueeze (group_part, two)
    token_part = MatMul (x, down_x_columns)
    token_padded = Pad (token_part, pads)
    keep_batch = Constant <value_ints: ints = [0, -1]> ()
    width = Shape <start: int = 0, end: int = 1> (down_w)
    cells_shape = Concat <axis: int = 0> (keep_batch, ratio, width)
    token_cells = Reshape (token_padded, cells_shape)
    sums = Add (token_cells, group_cells)
    codes = Tanh (sums)
    correction = MatMul (codes, up_columns)
    shifted = Add (y, up_b)
    repeated = Unsqueeze (shifted, two)
    cells = Add (correction, repeated)
    token_shape = Concat <axis: int = 0> (keep_batch, hidden)
    tokens = Reshape (cells, token_shape)
    out = Slice (tokens, zero, length, one)
"""

TOKEN_MERGE = Op("TokenMerge", ("x", "weight", "bias"), "y", token_merge, _merged_like, _MERGE_BODY.format(**_PLAIN))
MASKED_TOKEN_MERGE = Op(
    "MaskedTokenMerge",
    ("x", "mask", "weight", "bias"),
    "y",
    masked_token_merge,
    _merged_like,
    _MERGE_BODY.format(**_MASKED),
)
TOKEN_SPLIT = Op(
    "TokenSplit",
    ("y", "x", "down_w", "down_b", "up_w", "up_b"),
    "out",
    token_split,
    _split_like,
    _SPLIT_BODY,
)

OPS: tuple[Op, ...] = (TOKEN_MERGE, MASKED_TOKEN_MERGE, TOKEN_SPLIT)


@cache
def _torch_op(op: Op) -> Callable[..., Tensor]:
    """Register the operator with ``torch.library`` (once) and return its overload."""
    arguments = ", ".join(f"Tensor {name}" for name in op.inputs)
    torch.library.define(op.torch_name, f"({arguments}, int ratio) -> Tensor")
    torch.library.impl(op.torch_name, "CompositeExplicitAutograd")(op.reference)
    torch.library.register_fake(op.torch_name)(op.fake)
    namespace, name = op.torch_name.split("::")
    overload: Callable[..., Tensor] = getattr(getattr(torch.ops, namespace), name).default
    return overload


def translation_table() -> dict[Callable[..., object], Callable[..., object]]:
    """Map each PyTorch operator to a function that emits its ONNX node, for ``torch.onnx.export``."""
    return {_torch_op(op): _emit(op) for op in OPS}


def _emit(op: Op) -> Callable[..., object]:
    import onnxscript

    _register_schema(op)
    symbolic = onnxscript.values.Op(onnxscript.values.Opset(DOMAIN, VERSION), op.name, op.schema)

    def emit(*values: object) -> object:
        *tensors, ratio = values
        return symbolic(*tensors, ratio=ratio)

    return emit


def _register_schema(op: Op) -> None:
    if not onnx.defs.has(op.name, VERSION, DOMAIN):
        onnx.defs.register_schema(op.schema)


def functions(names: Sequence[str]) -> list[onnx.FunctionProto]:
    """The function bodies of the named operators."""
    return [op.function for op in OPS if op.name in names]
