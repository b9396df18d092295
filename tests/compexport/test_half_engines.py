"""Families in fp16 and bf16, whole: built, looked into, run and compared with PyTorch in fp32, for every method."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
from onnx import TensorProto
from safetensors.torch import load_file, save_file

from compexport.errors import InputError, ParityError
from engines.bundle import Bundle
from engines.manifest import HIDDEN, PAST, PRESENT, PREVIOUS
from engines.runtime import Runtime
from exporter import family, parity
from exporter.backbone import load_backbone, load_seq2seq
from exporter.checkpoint import save_checkpoint
from exporter.methods.ode_exits import ExitHeads
from tests.compexport.conftest import TEXTS
from tests.models import HIDDEN as WIDTH

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CLASSIFY, WRITE_ON, WRITE = "sequence-classification", "text-generation", "text2text-generation"
# Name: model, task, ratio, and what else its build is told.
FAMILIES: dict[str, tuple[str, str, float, dict[str, Any]]] = {
    "variator": ("tiny-t5", "label-words", 2, {"method": "variator"}),
    "costeff": ("tiny-bert", CLASSIFY, 2, {"method": "costeff", "exits": {2: (1, 2)}, "prefixes": True}),
    "ode": ("tiny-albert", CLASSIFY, 2, {"method": "ode", "step_engine": True}),
    "decoder": ("tiny-gpt2-shared", WRITE_ON, 2, {"method": "ode"}),
    "modular": ("tiny-t5-pair", WRITE, 2, {"method": "modular"}),
}
# What adds up many numbers, which half precision may not.
SUMS = ("Softmax", "LogSoftmax", "LayerNormalization", "ReduceMean", "ReduceSum", "ReduceL2", "ReduceLogSumExp", "Sqrt")
INSIDE = (HIDDEN, PREVIOUS, PAST, PRESENT, "encoder_hidden_states", "last_hidden_state")


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    def get(name: str) -> Path:
        model, task, _, _ = FAMILIES[name]
        if name != "ode":
            return tiny(model, task)
        made = tmp_path_factory.mktemp("heads") / "checkpoint"
        torch.manual_seed(0)
        heads = ExitHeads(3, WIDTH, 2).state_dict()
        save_checkpoint(made, tiny(model, task), "ode", {"form": "block", "steps": {"2": [[3, 2, 1]]}}, {2: heads})
        return made

    return get


@pytest.fixture(scope="module")
def made(folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """``made("costeff")``: its family in fp16, built once. Do not write into it."""
    built: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        if name not in built:
            _, _, ratio, options = FAMILIES[name]
            output = tmp_path_factory.mktemp(name) / "bundle"
            family.build(folder(name), [ratio], output, precision="fp16", untrained=True, **options)
            built[name] = Bundle.open(output)
        return built[name]

    return get


def typed(path: Path) -> onnx.ModelProto:
    """A graph with the type of every tensor, its functions inlined."""
    return onnx.shape_inference.infer_shapes(onnx.inliner.inline_local_functions(onnx.load(str(path))))


def read_types(model: onnx.ModelProto) -> dict[str, set[int]]:
    """Operator -> types of the first tensors that it reads."""
    graph = model.graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    found = defaultdict(set)
    for node in graph.node:
        if node.input:
            found[node.op_type].add(kinds[node.input[0]])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_in_fp16(name: str, made: Callable[[str], Bundle]) -> None:
    """Products in half, sums in fp32; only what stays inside a family is half at its edges."""
    manifest = made(name).manifest
    assert all(one.precision == "fp16" and variant.endswith("-fp16") for variant, one in manifest.variants.items())
    for graph in manifest.graphs.values():
        types = read_types(typed(made(name).path / graph.path))
        for op in SUMS:
            assert types.get(op, set()) <= {TensorProto.FLOAT}, op
        products = types.get("MatMul", set()) | types.get("Gemm", set())
        assert products <= {TensorProto.FLOAT16}
        for spec in (*graph.inputs, *graph.outputs):
            inside = spec.name.startswith(INSIDE) and manifest.task != "feature-extraction"
            wanted = "float16" if inside else "float32"
            assert spec.dtype in (wanted, "int64"), spec
        rounding = graph.parity.rounding
        assert rounding is not None and 0 < rounding.max_relative <= rounding.tolerance == 2e-2
        assert rounding.same_choice is None or rounding.same_choice >= rounding.least_same_choice == 0.99
    weights = [name for name in manifest.files if name.startswith("graphs/") and name.endswith(".bin")]
    assert weights == ["graphs/weights.bin"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["variator", "costeff", "ode"])
def test_classifiers_in_fp16_answer_as_pytorch_in_fp32(
    name: str, made: Callable[[str], Bundle], folder: Callable[[str], Path]
) -> None:
    from exporter.graphs.stock import stock_outputs

    backbone = load_backbone(folder(name))
    with Runtime(made(name), threads=1) as runtime:
        encoded = [one.encoding for one in runtime._opening.encoder().encode(TEXTS)]
        for variant, entry in made(name).manifest.variants.items():
            found = runtime(TEXTS, variant=variant)
            for result, encoding in zip(found, encoded, strict=True):
                scores = list(result.output["scores"].values())
                assert sum(scores) == pytest.approx(1)
                if entry.ratio != 1:
                    continue
                given = {"input_ids": encoding.ids, "attention_mask": encoding.attention_mask}
                given |= {"token_type_ids": encoding.type_ids} if "token_type_ids" in backbone.input_names else {}
                with torch.no_grad():
                    (logits,) = stock_outputs(backbone, {key: torch.tensor([value]) for key, value in given.items()})
                assert scores == pytest.approx(logits[0].softmax(-1).tolist(), abs=1e-2)


@pytest.mark.slow
def test_rows_leave_a_cascade_in_fp16(made: Callable[[str], Bundle]) -> None:
    """``hidden`` goes in half from segment to segment, and only of rows that stay."""
    from engines.backends import ort
    from engines.cascade import Cascade
    from engines.exit_rule import ExitRule

    for name, variant in (("costeff", "costeff-r2-fp16"), ("ode", "ode-r2-fp16"), ("ode", "ode-r2-step-fp16")):
        ids = np.random.default_rng(0).integers(5, 100, (4, 9))
        feed = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        session = ort.open_sessions(made(name), [variant], threads=1)[variant]
        assert isinstance(session, Cascade)
        feed = {spec.name: feed[spec.name] for spec in session.inputs}
        everything = session.every_exit().run(feed)
        entropy = everything["entropy"][:, 0]
        limit = float(np.sort(entropy)[1:3].mean())
        run = session.run_exits(feed, ExitRule([limit, *[-1.0] * (len(session.exits) - 2)]))
        first = entropy < limit
        assert first.sum() == 2
        assert (run.exit_layer == np.where(first, session.exits[0], session.exits[-1])).all()
        wanted = np.where(first[:, None], everything["logits"][:, 0], everything["logits"][:, -1])
        np.testing.assert_allclose(run.logits, wanted, atol=5e-3)


@pytest.mark.slow
def test_a_decoder_in_fp16_writes_with_a_half_cache(made: Callable[[str], Bundle], tiny: Callable[..., Path]) -> None:
    model = load_backbone(tiny("tiny-gpt2-shared", WRITE_ON)).model.eval()
    with Runtime(made("decoder"), threads=1) as runtime:
        found = runtime(TEXTS[:2], max_new_tokens=8, ratio=1)
        tokens = [one.encoding.ids for one in runtime._opening.encoder().encode(TEXTS[:2])]
    for result, ids in zip(found, tokens, strict=True):
        text = torch.tensor([[*ids, *result.output["tokens"]]])
        with torch.no_grad():
            logits = model(input_ids=text, attention_mask=torch.ones_like(text)).logits[0, len(ids) - 1 : -1]
        chosen = logits.gather(1, text[0, len(ids) :, None])[:, 0]
        # What fp16 wrote is, token by token, as good as the best in fp32 to within fp16's rounding.
        assert (logits.amax(-1) - chosen).max() <= 2e-2 * logits.abs().max()


@pytest.mark.slow
def test_an_encoder_decoder_in_fp16_writes(made: Callable[[str], Bundle], folder: Callable[[str], Path]) -> None:
    model = load_seq2seq(folder("modular")).model.eval()
    with Runtime(made("modular"), threads=1) as runtime:
        greedy = runtime(TEXTS[:2], max_new_tokens=8, ratio=1)
        beams = runtime(TEXTS[:2], max_new_tokens=8, ratio=2, settings={"num_beams": 3})
        sources = [one.encoding.ids for one in runtime._opening.encoder().encode(TEXTS[:2])]
    assert all(len(one.output["tokens"]) for one in beams)
    start = model.generation_config.decoder_start_token_id
    for result, ids in zip(greedy, sources, strict=True):
        written = torch.tensor([result.output["tokens"]])
        given = torch.cat((torch.tensor([[start]]), written[:, :-1]), dim=1)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), decoder_input_ids=given).logits[0]
        chosen = logits.gather(1, written[0, :, None])[:, 0]
        assert (logits.amax(-1) - chosen).max() <= 2e-2 * logits.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["variator", "costeff"])
def test_graphs_in_bf16(name: str, folder: Callable[[str], Path], tmp_path: Path) -> None:
    """For TensorRT: compared widened, since no runtime here computes them, and by PyTorch in bf16."""
    _, _, ratio, options = FAMILIES[name]
    family.build(folder(name), [ratio], tmp_path / "b", precision="bf16", backend="trt", untrained=True, **options)
    for graph in Bundle.open(tmp_path / "b").manifest.graphs.values():
        types = read_types(typed(tmp_path / "b" / graph.path))
        assert types["MatMul"] | types["Gemm"] <= {TensorProto.BFLOAT16}
        assert types["Softmax"] <= {TensorProto.FLOAT}
        assert graph.parity.rounding is not None and graph.parity.rounding.tolerance == 0.16
        assert not any(spec.dtype == "float16" for spec in (*graph.inputs, *graph.outputs))


def test_bf16_is_refused_where_no_processor_multiplies_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--precision: got bf16, expected fp32 or fp16; .*--backend trt-rtx"):
        family.build(tiny(), [2], tmp_path / "b", precision="bf16", untrained=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_model_that_outgrows_fp16_is_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """ONNX Runtime's processor kernels would not notice: they multiply fp16 in fp32."""
    model = Path(shutil.copytree(tiny("tiny-bert", CLASSIFY), tmp_path / "model"))
    tensors = load_file(model / "model.safetensors")
    tensors["bert.encoder.layer.1.intermediate.dense.bias"] += 6e4
    tensors["bert.encoder.layer.1.output.dense.weight"] *= 30
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ParityError) as error:
        family.build(model, [2], tmp_path / "b", precision="fp16", method="variator", untrained=True)
    said = str(error.value)
    assert "logits differs from fp32: got a value that is not finite" in said and "--precision fp32" in said
    assert "\n" not in said and not (tmp_path / "b").exists()


@pytest.mark.slow
def test_another_precision_is_another_build(tiny: Callable[..., Path], tmp_path: Path) -> None:
    def build(precision: Any) -> family.BuildReport:
        return family.build(tiny("tiny-bert", CLASSIFY), [1], tmp_path / "b", precision=precision, method="variator")

    first = build("fp16")
    (row,) = first.document()["variants"]
    assert row["precision"] == "fp16" and 0 < row["rounding_max_relative"] <= 2e-2
    assert not first.reused and list(first.manifest.variants) == ["variator-r1-fp16"]
    assert build("fp16").reused == {"r1"}
    second = build("fp32")
    assert not second.reused and list(second.manifest.variants) == ["variator-r1-fp32"]
    assert second.manifest.graphs["r1"].parity.rounding is None
    assert first.manifest.graphs["r1"].key != second.manifest.graphs["r1"].key


def test_half_precision_tolerances_are_written_down() -> None:
    assert (parity.ROUNDING["fp16"].relative, parity.ROUNDING["fp16"].same_choice) == (2e-2, 0.99)
    assert (parity.ROUNDING["bf16"].relative, parity.ROUNDING["bf16"].same_choice) == (8 * 2e-2, 0.99)
    assert parity.TOLERANCE == {"fp32": 1e-4}
