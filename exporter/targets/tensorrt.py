"""The rules of TensorRT's and TensorRT-RTX's ONNX parser and builder, and of TensorRT alone, as one table.

``RULES`` at the end is the table; what stands before it are its questions. Where a rule has been seen to hold, a test
shows NVIDIA's own parser or builder refusing the smallest graph that breaks it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import onnx
import onnx.defs
from onnx import TensorProto

from exporter.targets.places import Opened, Place, Scope, Size
from exporter.targets.rules import (
    ANOTHER_RESULT,
    DOCUMENTED,
    NOT_BUILT,
    NOT_PARSED,
    SEEN,
    SOURCE,
    TO_KNOW,
    Fault,
    Rule,
    at_nodes,
)

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
BOTH = (TENSORRT, TENSORRT_RTX)

OPSETS = range(9, 25)
TOPK_MOST = 3840
STANDARD = ("", "ai.onnx")
# Operators of NVIDIA's own that the parser knows by name, in whatever domain.
NVIDIA_OPERATORS = ("TRT_Attention", "TRT_KVCacheUpdate", "TRT_MoE")
# Standard operators to which the parser of TensorRT-RTX 1.7.1 answers that it does not know them.
# fmt: off
NOT_IMPORTED = frozenset(
    [
        "AffineGrid", "Bernoulli", "BitCast", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor",
        "CenterCropPad", "Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "CumProd", "DFT",
        "DeformConv", "Det", "DynamicQuantizeLinear", "ImageDecoder", "MatMulInteger", "MaxRoiPool",
        "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss", "Optional",
        "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch",
        "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength",
        "SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer",
        "StringSplit", "SwiGLU", "TfIdfVectorizer", "Unique",
    ]
)
# fmt: on
# TensorRT runs these by plugins that it brings along; TensorRT-RTX has no plugins.
BY_PLUGIN = ("DeformConv", "NonZero", "RoiAlign")
ONE_OUTPUT = ("Attention", "LayerNormalization", "MaxPool")
REDUCTIONS = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax"),
    *("ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum", "ReduceSumSquare"),
)
KINDS = frozenset(
    getattr(TensorProto, name)
    for name in (
        *("UNDEFINED", "FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL"),
        *("INT4", "FLOAT8E4M3FN", "FLOAT4E2M1", "FLOAT8E8M0"),
    )
    if hasattr(TensorProto, name)
)


def tied_sizes(model: Opened) -> dict[str, list[str]]:
    """Sizes of inputs that have one name: name -> its axes, ``input_ids[0]``. They must be equal in every profile."""
    stored = {tensor.name for tensor in model.written.graph.initializer}
    axes: defaultdict[str, list[str]] = defaultdict(list)
    for value in model.written.graph.input:
        for index, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and value.name not in stored:
                axes[dim.dim_param].append(f"{value.name}[{index}]")
    return {name: places for name, places in axes.items() if len(places) > 1}


# --- the model as a whole, and names ---------------------------------------------------------------------------------


def _opset(model: Opened) -> Iterator[Fault]:
    if model.opset not in OPSETS:
        yield Fault(None, f"opset {model.opset}")


def _kinds(model: Opened) -> Iterator[Fault]:
    graph = model.written.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type not in KINDS or not value.type.HasField("tensor_type"):
            yield Fault(None, f"{value.name} of type {_kind(value.type.tensor_type.elem_type)}")
    for tensor in graph.initializer:
        if tensor.data_type not in KINDS:
            yield Fault(None, f"stored {tensor.name} of type {_kind(tensor.data_type)}")


@at_nodes("Cast")
def _cast_kind(place: Place) -> str | None:
    to = int(place.number("to", 0))
    return None if to in KINDS else f"a cast to {_kind(to)}"


@at_nodes("Cast")
def _uint8(place: Place) -> str | None:
    outputs = {value.name for value in place.scope.graph.output}
    inside = place.node.output[0] not in outputs
    return "uint8 inside the graph" if int(place.number("to", 0)) == TensorProto.UINT8 and inside else None


def _doubles(model: Opened) -> Iterator[Fault]:
    graph = model.written.graph
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.DOUBLE:
            yield Fault(None, f"{value.name} of type double")


def _kind(number: int) -> str:
    return TensorProto.DataType.Name(number).lower() if number in TensorProto.DataType.values() else str(number)


def _like_operators(model: Opened) -> Iterator[Fault]:
    functions = model.functions
    for domain, name in functions:
        if _is_imported(name):
            yield Fault(None, f"the function {domain}.{name}")
    for call in model.calls:
        key = (call.node.domain, call.node.op_type)
        if call.node.domain not in STANDARD and key not in functions and _is_imported(call.node.op_type):
            yield Fault(call, f"{call.node.op_type} of domain {call.node.domain}")


def _namesakes(model: Opened) -> Iterator[Fault]:
    counts = Counter(name for _, name in model.functions)
    for domain, name in model.functions:
        if counts[name] > 1:
            yield Fault(None, f"the function {name} in domain {domain} too")


def _unknown(model: Opened) -> Iterator[Fault]:
    for place in model.places:
        name, domain = place.node.op_type, place.node.domain
        if not _is_standard(name) and name not in NVIDIA_OPERATORS:
            asked = f", for which {_text(place, 'plugin_namespace')} must have a plugin"
            yield Fault(place, f"{domain or 'ai.onnx'}.{name}{asked if place.attribute('plugin_namespace') else ''}")


def _is_standard(name: str) -> bool:
    return bool(onnx.defs.has(name))


def _is_imported(name: str) -> bool:
    return (_is_standard(name) and name not in NOT_IMPORTED) or name in NVIDIA_OPERATORS


def _text(place: Place, name: str) -> str:
    found = place.attribute(name)
    return found.s.decode(errors="replace") if found is not None else ""


# --- functions -------------------------------------------------------------------------------------------------------


def _calls(model: Opened) -> Iterator[Fault]:
    for call in model.calls:
        function = model.functions.get((call.node.domain, call.node.op_type))
        if function is None:
            continue
        inputs, outputs = list(call.node.input), list(call.node.output)
        if len(inputs) != len(function.input) or "" in inputs:
            given = sum(map(bool, inputs))
            yield Fault(call, f"{given} of {len(function.input)} inputs")
        if len(outputs) != len(function.output) or "" in outputs:
            given = sum(map(bool, outputs))
            yield Fault(call, f"{given} of {len(function.output)} outputs")


def _order(model: Opened) -> Iterator[Fault]:
    for function in model.written.functions:
        made = set(function.input)
        computed = {name for node in function.node for name in node.output}
        for node in function.node:
            early = [name for name in node.input if name in computed and name not in made]
            if early:
                yield Fault(None, f"{node.op_type} in {function.name} reads {early[0]} before it is computed")
                break
            made.update(node.output)


def _wide_attributes(model: Opened) -> Iterator[Fault]:
    for call in model.calls:
        if call.attribute("plugin_namespace") is None:
            continue
        for one in call.node.attribute:
            if any(not -(2**31) <= number < 2**31 for number in (one.i, *one.ints)):
                yield Fault(call, f"{one.name} beyond 32 bits")


# --- operators -------------------------------------------------------------------------------------------------------


@at_nodes(*NOT_IMPORTED.difference(BY_PLUGIN))
def _not_imported(place: Place) -> str | None:
    return place.node.op_type


@at_nodes(*BY_PLUGIN)
def _by_plugin(place: Place) -> str | None:
    return place.node.op_type


@at_nodes("ScatterElements")
def _scatter_elements(place: Place) -> str | None:
    return _reduction(place)


@at_nodes("ScatterElements")
def _scatter_bfloat16(place: Place) -> str | None:
    reduction = _reduction(place)
    return (
        f"{reduction} in bfloat16" if reduction and place.scope.kind(place.input(0)) == TensorProto.BFLOAT16 else None
    )


@at_nodes("ScatterND")
def _scatter_nd(place: Place) -> str | None:
    return _reduction(place)


def _reduction(place: Place) -> str | None:
    reduction = _text(place, "reduction")
    return f"reduction {reduction}" if reduction not in ("", "none") else None


@at_nodes("NonZero", "NonMaxSuppression")
def _data_dependent(place: Place) -> str | None:
    return f"{place.node.op_type}, whose result's size depends on data"


@at_nodes("TopK")
def _topk(place: Place) -> str | None:
    k = place.scope.value(place.input(1))
    return f"K of {int(k.max())}" if k is not None and k.size and k.max() > TOPK_MOST else None


@at_nodes(*REDUCTIONS)
def _reduction_axes(place: Place) -> str | None:
    axes = place.input(1)
    return "axes that are computed" if axes and not place.scope.is_stored(axes) else None


@at_nodes("Squeeze", "Unsqueeze")
def _squeezed_axes(place: Place) -> str | None:
    axes = place.input(1)
    return "axes that depend on an input" if axes and not place.scope.is_fixed(axes) else None


@at_nodes("OneHot")
def _depth(place: Place) -> str | None:
    return None if place.scope.is_fixed(place.input(1)) else "a depth that depends on an input"


@at_nodes("CumSum")
def _sum_axis(place: Place) -> str | None:
    return None if place.scope.is_fixed(place.input(1)) else "an axis that depends on an input"


@at_nodes(*ONE_OUTPUT)
def _one_output(place: Place) -> str | None:
    outputs = len(place.node.output)
    return f"{outputs} outputs" if outputs > 1 else None


@at_nodes("BatchNormalization")
def _training(place: Place) -> str | None:
    return "training_mode 1" if place.number("training_mode", 0) else None


@at_nodes("Attention")
def _attention(place: Place) -> str | None:
    if place.number("softcap", 0):
        return "softcap"
    return "past keys and values" if place.input(4) or place.input(5) else None


@at_nodes("Attention")
def _attention_kernel(place: Place) -> str | None:
    exact = place.scope.kind(place.input(0)) == TensorProto.FLOAT and not place.number("TRT_decomposable", 0)
    return "float32" if exact else None


@at_nodes("Einsum")
def _equation(place: Place) -> str | None:
    equation = _text(place, "equation")
    return f"the equation {equation}" if equation != equation.lower() else None


@at_nodes("QuantizeLinear", "DequantizeLinear")
def _zero_point(place: Place) -> str | None:
    if not place.input(2):
        return None
    zero = place.scope.value(place.input(2))
    return f"zero point {zero.flat[np.argmax(zero != 0)]}" if zero is not None and np.any(zero != 0) else None


@at_nodes("TensorScatter")
def _tensor_scatter(place: Place) -> str | None:
    shape, axis = place.scope.shape(place.input(0)), int(place.number("axis", -2))
    if shape is not None and len(shape) != 4:
        return f"a cache of {len(shape)} axes"
    return f"axis {axis}" if axis not in (-2, 2) else None


# --- control flow ----------------------------------------------------------------------------------------------------


@at_nodes("If")
def _condition(place: Place) -> str | None:
    shape = place.scope.shape(place.input(0))
    return f"a condition of shape {_sizes(shape)}" if shape and any(size != 1 for size in shape) else None


def _sizes(shape: tuple[Size, ...]) -> str:
    return "[" + ", ".join("?" if size is None else str(size) for size in shape) + "]"


def _results(place: Place, attribute: str) -> list[tuple[int, tuple[Size, ...] | None]]:
    """Type and shape of what an inner graph gives back."""
    found = place.attribute(attribute)
    if found is None:
        return []
    inner = Scope(found.g, place.scope)
    return [(inner.kind(value.name), inner.shape(value.name)) for value in found.g.output]


def _branches(place: Place) -> Iterator[tuple[tuple[int, tuple[Size, ...] | None], ...]]:
    return zip(_results(place, "then_branch"), _results(place, "else_branch"), strict=False)


@at_nodes("If")
def _branch_kinds(place: Place) -> str | None:
    for (then_kind, _), (else_kind, _) in _branches(place):
        if then_kind != else_kind and TensorProto.UNDEFINED not in (then_kind, else_kind):
            return f"{_kind(then_kind)} and {_kind(else_kind)}"
    return None


@at_nodes("If")
def _branch_ranks(place: Place) -> str | None:
    for (_, one), (_, other) in _branches(place):
        if one is not None and other is not None and len(one) != len(other):
            return f"{_sizes(one)} and {_sizes(other)}"
    return None


@at_nodes("If")
def _branch_sizes(place: Place) -> str | None:
    for (_, one), (_, other) in _branches(place):
        if one is not None and other is not None and len(one) == len(other) and one != other:
            return f"{_sizes(one)} and {_sizes(other)}"
    return None


@at_nodes("Loop")
def _carried(place: Place) -> str | None:
    """Carried values come after the trip count and the condition on the way in, after the condition on the way out."""
    body = place.attribute("body")
    if body is None:
        return None
    inner = Scope(body.g, place.scope)
    for before, after in zip(body.g.input[2:], body.g.output[1:], strict=False):
        one, other = inner.shape(before.name), inner.shape(after.name)
        if one is not None and other is not None and one != other and None not in (*one, *other):
            return f"{_sizes(one)} going in and {_sizes(other)} coming out"
    return None


def _rule(
    name: str,
    faults: Callable[[Opened], Iterable[Fault]],
    expected: str,
    outcome: str,
    evidence: str = SEEN,
    products: tuple[str, ...] = BOTH,
) -> Rule:
    return Rule(name, expected, outcome, evidence, products, faults)


RULES: tuple[Rule, ...] = (
    # the model as a whole
    _rule("opset", _opset, "9 to 24", NOT_PARSED, DOCUMENTED, (TENSORRT,)),
    _rule("type", _kinds, "float, float16, bfloat16, int64, int32, int8, bool, or 4 and 8 bits", NOT_PARSED),
    _rule("cast", _cast_kind, "a type that is supported", NOT_PARSED),
    _rule("uint8", _uint8, "uint8 as input or output of the graph alone", NOT_PARSED),
    _rule("double", _doubles, "float, to which it is narrowed", TO_KNOW, SEEN),
    # names
    _rule("name-of-an-operator", _like_operators, "a name that no standard operator has", ANOTHER_RESULT),
    _rule("name-used-twice", _namesakes, "one function of a name, whatever its domain", ANOTHER_RESULT),
    _rule("unknown-operator", _unknown, "a standard operator, or a function in the file", NOT_PARSED),
    _rule("not-imported", _not_imported, "another operator: the parser has no importer for it", NOT_PARSED),
    # functions
    _rule("call", _calls, "every one of the function's, none left out", NOT_PARSED),
    _rule("order", _order, "the nodes of a function in the order of their inputs", NOT_PARSED),
    _rule("wide-attribute", _wide_attributes, "what fits into 32 bits", ANOTHER_RESULT, SOURCE, (TENSORRT,)),
    # operators
    _rule("plugin-operator", _by_plugin, "another operator: there are no plugins", NOT_PARSED, SEEN, (TENSORRT_RTX,)),
    _rule("scatter-reduction", _scatter_elements, "no reduction", NOT_PARSED, SEEN, (TENSORRT_RTX,)),
    _rule("scatter-bfloat16", _scatter_bfloat16, "float or float16", NOT_BUILT, SOURCE, (TENSORRT,)),
    _rule("scatternd-reduction", _scatter_nd, "no reduction", NOT_PARSED),
    _rule("data-dependent", _data_dependent, "sizes that follow from those of inputs", TO_KNOW, SOURCE, (TENSORRT,)),
    _rule("topk", _topk, f"at most {TOPK_MOST}", NOT_BUILT),
    _rule("reduction-axes", _reduction_axes, "stored ones, at most cast", NOT_PARSED),
    _rule("squeezed-axes", _squeezed_axes, "what is computed from stored values", NOT_PARSED),
    _rule("one-hot-depth", _depth, "what is computed from stored values", NOT_BUILT),
    _rule("cumsum-axis", _sum_axis, "what is computed from stored values", NOT_BUILT),
    _rule("one-output", _one_output, "the first alone", NOT_PARSED),
    _rule("training-mode", _training, "training_mode 0", NOT_PARSED),
    _rule("attention-inputs", _attention, "queries, keys, values and a mask alone", NOT_PARSED),
    _rule("attention-kernel", _attention_kernel, "16 bits, or TRT_decomposable=1 at the node", NOT_BUILT),
    _rule("einsum", _equation, "small letters", NOT_PARSED),
    _rule("zero-point", _zero_point, "0", NOT_PARSED),
    _rule("tensor-scatter", _tensor_scatter, "a cache of 4 axes, written along the last but one", NOT_PARSED),
    # control flow
    _rule("condition", _condition, "a scalar", NOT_PARSED),
    _rule("branch-types", _branch_kinds, "one type from both branches", NOT_PARSED),
    _rule("branch-ranks", _branch_ranks, "one number of axes from both branches", NOT_BUILT),
    _rule("branch-sizes", _branch_sizes, "equal sizes, which are sure to build", TO_KNOW, SEEN),
    _rule("carried-shape", _carried, "a shape that no round changes", NOT_BUILT),
)
