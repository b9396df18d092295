"""For every rule the smallest graphs that break it, and what TensorRT-RTX does with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from textwrap import dedent

from exporter.targets.rules import NOT_BUILT, NOT_PARSED

TAKEN = "built"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Broken:
    """``rtx``: what TensorRT-RTX does; ``says``: part of its message; ``layers``: kinds of the layers it makes."""

    rule: str
    text: str
    got: str
    rtx: str
    says: str = ""
    layers: tuple[str, ...] = ()
    profile: dict[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)
    values: dict[str, tuple[Shape, Shape, Shape]] = field(default_factory=dict)


def model(text: str, opset: int = 20, domains: str = "") -> str:
    """A model in ONNX's text form; what follows a line of dashes is a function of domain compexport."""
    graph, *functions = dedent(text).split("---\n")
    imports = f'"" : {opset}, "compexport" : 1, "other" : 1, "com.microsoft" : 1'
    heads = [f'<domain: "{domain}", opset_import: ["" : {opset}]>\n' for domain in domains.split()]
    heads += [f'<domain: "compexport", opset_import: ["" : {opset}]>\n'] * (len(functions) - len(heads))
    bodies = "\n".join(head + body for head, body in zip(heads, functions, strict=True))
    return f"<ir_version: 10, opset_import: [{imports}]>\n{graph}{bodies}"


def one(nodes: str, opset: int = 20) -> str:
    """``nodes`` from x [4,8] to y."""
    return model(f"g (float[4,8] x) => (float[A,B] y) {{ {nodes} }}", opset)


def fixed(**shapes: Shape) -> dict[str, tuple[Shape, Shape, Shape]]:
    return {name: (shape, shape, shape) for name, shape in shapes.items()}


ATTENTION = "g ({0}[B,4,N,16] q, {0}[B,4,N,16] k, {0}[B,4,N,16] v) => ({0}[B,4,N,16] y) {{ y = Attention{1}(q, k, v) }}"
SEQUENCES: dict[str, tuple[Shape, Shape, Shape]] = dict.fromkeys("qkv", ((1, 4, 8, 16), (2, 4, 64, 16), (4, 4, 99, 16)))
PAST = """
    g (float16[1,4,8,16] q, float16[1,4,8,16] k, float16[1,4,8,16] v, float16[1,4,8,16] a, float16[1,4,8,16] b)
      => (float16[1,4,8,16] y, float16[1,4,16,16] c, float16[1,4,16,16] d) { y, c, d = Attention(q, k, v, , a, b) }
    """
BRANCHES = """
    g (bool c, float[2,4] x) => (float[2,M] y) {{ z = If(c) <
      then_branch = t () => (float[2,4] a) {{ a = Relu(x) }},
      else_branch = f () => ({0} b) {{ {1} }}> y = Cast<to = 1>(z) }}
    """
LOOP = """
    g (float[1,4] x, int64 n, bool s) => (float[M,4] y) { y = Loop(n, s, x) <
      body = b (int64 i, bool c, float[1,4] v) => (bool d, float[2,4] w) { d = Identity(c) w = Concat<axis = 0>(v, v) }>
    }
    """
NORM = "g (float[4,8] x, float[8] s) => (float[4,8] y, float[4,1] m) { y, m = LayerNormalization(x, s) }"
BATCH_NORM = """
    g (float[4,8] x, float[8] s, float[8] b, float[8] m, float[8] v) => (float[4,8] y) {
      y, c, d = BatchNormalization<training_mode = 1>(x, s, b, m, v) }
    """
SCATTER = 'g ({0}[4,8] x, int64[2,{1}] i, {0}[2,8] u) => ({0}[4,8] y) {{ y = {2}<reduction = "add">(x, i, u) }}'
CACHE = "g (float16[{0}] p, float16[{1}] u, int64[1] w) => (float16[{0}] y) {{ y = TensorScatter{2}(p, u, w) }}"
TWO_NAMES = """
    g (float[4,8] x) => (float[4,8] y, float[4,8] z) { y = compexport.F(x) z = other.F(x) }
    ---
    F (a) => (b) { b = Relu(a) }
    ---
    F (a) => (b) { b = Sin(a) }
    """
QUANTIZE = """
    g (float[4,8] x) => (float[4,8] y) <float s = {0.1}, int8 z = {3}> {
      a = QuantizeLinear(x, s, z) y = DequantizeLinear(a, s, z) }
    """
CALL = "g (float[4,8] x) => (float[4,8] y) { y = compexport.F(x) }\n---\n"

BROKEN: tuple[Broken, ...] = (
    Broken("opset", one("y = Relu(x)", 25), "opset 25", TAKEN),
    Broken("opset", one("y = Relu(x)", 8), "opset 8", TAKEN),
    Broken(
        "type", model("g (int16[4,8] x) => (int16[4,8] y) { y = Identity(x) }"), "x of type int16", NOT_PARSED, "data"
    ),
    Broken(
        "type", model("g (string[4,8] x) => (string[4,8] y) { y = Identity(x) }"), "type string", NOT_PARSED, "type"
    ),
    Broken(
        "type",
        model("g (float[4] x) => (float[4] y) <int16 k = {3}> { c = Cast<to = 1>(k) y = Add(x, c) }"),
        "stored k of type int16",
        NOT_PARSED,
        "initializer",
    ),
    Broken(
        "cast", one("a = Cast<to = 5>(x) y = Cast<to = 1>(a)"), "a cast to int16", NOT_PARSED, "Unsupported data type"
    ),
    Broken("uint8", one("a = Cast<to = 2>(x) y = Cast<to = 1>(a)"), "uint8 inside", NOT_PARSED, "UINT8"),
    Broken("double", model("g (double[4] x) => (double[4] y) { y = Relu(x) }"), "x of type double", TAKEN),
    Broken(
        "name-of-an-operator",
        model(CALL.replace("F(x)", "Relu(x)") + "Relu (a) => (b) { b = Sin(a) }"),
        "the function compexport.Relu",
        TAKEN,
        layers=("ACTIVATION",),
    ),
    Broken(
        "name-of-an-operator",
        model("g (float[4] x) => (float[4] y) { y = com.microsoft.Relu(x) }"),
        "Relu of domain com.microsoft",
        TAKEN,
        layers=("ACTIVATION",),
    ),
    Broken(
        "name-used-twice",
        model(TWO_NAMES, domains="compexport other"),
        "the function F in domain",
        TAKEN,
        layers=("ACTIVATION", "ACTIVATION"),
    ),
    Broken("unknown-operator", one("y = compexport.Nothing(x)"), "compexport.Nothing", NOT_PARSED, "Plugin not found"),
    Broken(
        "unknown-operator",
        one('y = compexport.Nothing<plugin_namespace = "compexport">(x)'),
        "compexport must have a plugin",
        NOT_PARSED,
        "Plugin not found",
    ),
    Broken(
        "not-imported",
        model("g (float[4,8] x, bool[4] c) => (float[M,8] y) { y = Compress<axis = 0>(x, c) }"),
        "Compress",
        NOT_PARSED,
    ),
    Broken("call", model(CALL + "F (a, b) => (c) { c = Relu(a) }"), "1 of 2 inputs", NOT_PARSED, "input().size()"),
    Broken("call", model(CALL + "F (a) => (c, d) { c = Relu(a) d = Sin(a) }"), "1 of 2 outputs", NOT_PARSED, "output"),
    Broken(
        "order", model(CALL + "F (a) => (c) { c = Relu(d) d = Sin(a) }"), "reads d before", NOT_PARSED, "not registered"
    ),
    Broken(
        "wide-attribute",
        model(
            'g (float[4] x) => (float[4] y) { y = compexport.F<plugin_namespace = "compexport", n = 5000000000>(x) }\n'
            "---\nF <n> (a) => (c) { k = Constant<value_int: int = @n>() z = Cast<to = 1>(k) c = Add(a, z) }"
        ),
        "n beyond 32 bits",
        TAKEN,
    ),
    Broken(
        "plugin-operator",
        model("g (float[4,8] x) => (int64[2,M] y) { y = NonZero(x) }"),
        "NonZero",
        NOT_PARSED,
        "plugin",
    ),
    Broken(
        "plugin-operator",
        model(
            "g (float[1,2,8,8] x, float[3,4] r, int64[3] b) => (float[3,2,2,2] y) { y = RoiAlign<output_height = 2, "
            "output_width = 2>(x, r, b) }"
        ),
        "RoiAlign",
        NOT_PARSED,
        "plugin",
    ),
    Broken(
        "plugin-operator",
        model(
            "g (float[1,2,8,8] x, float[2,2,3,3] w, float[1,18,6,6] o) => (float[1,2,6,6] y) { "
            "y = DeformConv<kernel_shape = [3, 3]>(x, w, o) }"
        ),
        "DeformConv",
        NOT_PARSED,
        "Plugin",
    ),
    Broken(
        "scatter-reduction",
        model(SCATTER.format("float", 8, "ScatterElements")),
        "reduction add",
        NOT_PARSED,
        "reduction",
    ),
    Broken("scatter-bfloat16", model(SCATTER.format("bfloat16", 8, "ScatterElements")), "add in bfloat16", NOT_PARSED),
    Broken(
        "scatternd-reduction", model(SCATTER.format("float", 1, "ScatterND")), "reduction add", NOT_PARSED, "ScatterND"
    ),
    Broken("data-dependent", model("g (float[4,8] x) => (int64[2,M] y) { y = NonZero(x) }"), "NonZero", NOT_PARSED),
    Broken(
        "topk",
        model("g (float[1,9000] x) => (float[1,K] y) { k = Constant<value_ints = [3841]>() y, i = TopK(x, k) }"),
        "K of 3841",
        NOT_BUILT,
        "3840",
    ),
    Broken(
        "reduction-axes",
        model("g (float[4,8] x, int64[1] a) => (float[4,1] y) { y = ReduceSum(x, a) }"),
        "axes that are computed",
        NOT_PARSED,
        "Axis input",
    ),
    Broken(
        "reduction-axes",
        one("a = Constant<value_ints = [0]>() b = Add(a, a) y = ReduceMax(x, b)"),
        "axes that are computed",
        NOT_PARSED,
        "Axis input",
    ),
    Broken(
        "squeezed-axes",
        model("g (float[4,8] x, int64[1] a) => (float[4,8,1] y) { y = Unsqueeze(x, a) }"),
        "axes that depend",
        NOT_PARSED,
        "unsqueeze axis is not a constant",
    ),
    Broken(
        "squeezed-axes",
        model("g (float[4,1] x, int64[1] a) => (float[4] y) { y = Squeeze(x, a) }"),
        "axes that depend",
        NOT_PARSED,
        "squeeze axis is not a constant",
    ),
    Broken(
        "one-hot-depth",
        model(
            "g (int64[N] x, float[2] v) => (float[N,M] y) { s = Shape(x) z = Constant<value_int = 0>() "
            "d = Gather(s, z) y = OneHot(x, d, v) }"
        ),
        "a depth that depends",
        NOT_BUILT,
        "must be a build time constant",
        profile={"x": ((4,), (8,), (16,))},
    ),
    Broken(
        "cumsum-axis",
        model("g (float[4,8] x, int64 d) => (float[4,8] y) { y = CumSum(x, d) }"),
        "an axis that depends",
        NOT_BUILT,
        values={"d": ((0,), (0,), (1,))},
    ),
    Broken("one-output", model(NORM), "2 outputs", NOT_PARSED, "outputs for LayerNormalization"),
    Broken("training-mode", model(BATCH_NORM), "training_mode 1", NOT_PARSED, "training_mode"),
    Broken(
        "attention-inputs", model(ATTENTION.format("float16", "<softcap = 2.0>"), 23), "softcap", NOT_PARSED, "softcap"
    ),
    Broken("attention-inputs", model(PAST, 23), "past keys", NOT_PARSED, "one output"),
    Broken(
        "attention-kernel",
        model(ATTENTION.format("float", ""), 23),
        "float32",
        NOT_BUILT,
        "not supported by a dedicated",
        profile=SEQUENCES,
    ),
    Broken(
        "einsum",
        model('g (float[4,8] x, float[8,3] z) => (float[4,3] y) { y = Einsum<equation = "Ab,bc->Ac">(x, z) }'),
        "the equation Ab",
        NOT_PARSED,
        "Invalid character",
    ),
    Broken("zero-point", model(QUANTIZE), "zero point 3", NOT_PARSED, "zero point"),
    Broken(
        "tensor-scatter", model(CACHE.format("1,4,8,16", "1,4,1,16", "<axis = 1>"), 24), "axis 1", NOT_PARSED, "axis"
    ),
    Broken("tensor-scatter", model(CACHE.format("1,8,16", "1,1,16", ""), 24), "a cache of 3 axes", NOT_PARSED, "4D"),
    Broken(
        "condition",
        model(BRANCHES.format("float[2,4]", "b = Neg(x)").replace("bool c", "bool[2] c")),
        "shape [2]",
        NOT_PARSED,
        "scalar",
    ),
    Broken(
        "branch-types",
        model(BRANCHES.format("float16[2,4]", "b = Cast<to = 10>(x)")),
        "float and float16",
        NOT_PARSED,
        "same type",
    ),
    Broken(
        "branch-ranks",
        model(BRANCHES.format("float[8]", "s = Constant<value_ints = [8]>() b = Reshape(x, s)")),
        "[2, 4] and [8]",
        NOT_BUILT,
        "equal ranks",
    ),
    Broken(
        "branch-sizes", model(BRANCHES.format("float[2,8]", "b = Concat<axis = 1>(x, x)")), "[2, 4] and [2, 8]", TAKEN
    ),
    Broken("carried-shape", model(LOOP), "[1, 4] going in and [2, 4] coming out", NOT_BUILT, "same shape"),
)
