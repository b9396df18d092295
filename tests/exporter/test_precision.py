"""Half precision in PyTorch: what stays in fp32, how masks stay finite, and how T5 stays in the range of fp16."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter import ops
from exporter.backbone import Backbone, load_seq2seq
from exporter.hosts import t5
from exporter.methods.variator import VariatorModel, VariatorPlugins
from exporter.precision import (
    DTYPES,
    SHRUNK_BY,
    Arithmetic,
    WideSums,
    array_of,
    lowest,
    narrowed,
    tensor_of,
    wide_sums,
)
from tests.exporter.conftest import random_plugins

HALF = [torch.float16, torch.bfloat16]
SUMS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "F.softmax": lambda x: F.softmax(x, dim=-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:], torch.ones(x.shape[-1]), torch.zeros(x.shape[-1])),
    "mean": lambda x: x.mean(-1),
    "sum": lambda x: x.sum(dim=-1),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", SUMS)
def test_what_adds_up_many_numbers_is_rounded_once(name: str, dtype: torch.dtype) -> None:
    x = (torch.randn(3, 50, generator=torch.Generator().manual_seed(0)) * 5).to(dtype)
    with WideSums():
        found = SUMS[name](x)
    assert found.dtype == dtype
    assert torch.equal(found, SUMS[name](x.float()).to(dtype))


def test_other_types_are_left_alone() -> None:
    x = torch.randn(2, 5)
    with WideSums():
        assert x.softmax(-1).dtype == torch.float32
        assert x.double().mean().dtype == torch.float64
        assert torch.ones(3, dtype=torch.long).sum() == 3
        assert F.softmax(x.half(), dim=-1, dtype=torch.float32).dtype == torch.float32
        assert (x.half() @ x.half().T).dtype == torch.float16
    assert isinstance(wide_sums(nn.Linear(2, 2).half()), WideSums)
    assert not isinstance(wide_sums(nn.Linear(2, 2)), WideSums)


@pytest.mark.parametrize("dtype", HALF)
def test_masked_scores_stay_finite(dtype: torch.dtype) -> None:
    """A place that is masked counts nothing, and where all are masked there is no NaN."""
    scores = torch.tensor([[-300.0, 2.0, 400.0], [-300.0, 2.0, 400.0]]).to(dtype)
    mask = torch.tensor([[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]).to(dtype) * lowest(dtype)
    with WideSums():
        found = (scores + mask).softmax(-1)
    assert torch.isfinite(scores + mask).all() and torch.isfinite(found).all()
    assert found[0, 2] == 0 and found[0, 1] == 1
    assert lowest(torch.float32) == torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", HALF)
def test_merging_weights_are_of_fp32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in ((2, 6, 8), (2, 16), (2,)))
    mask = torch.tensor([[1.0] * 6, [1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]).to(dtype)
    logits = F.linear(x.unflatten(1, (3, 2)).flatten(2), weight, bias)
    found = ops.TOKEN_MERGE(x, weight, bias, ratio=2)
    shares = logits.float().softmax(-1).to(dtype)
    assert torch.equal(found, torch.matmul(shares.unsqueeze(2), x.unflatten(1, (3, 2))).squeeze(2))
    merged = ops.MASKED_TOKEN_MERGE(x, mask, weight, bias, ratio=2)
    assert merged.dtype == dtype and torch.equal(merged[1, 2], torch.zeros(8, dtype=dtype))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_narrowed_copy(precision: str) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.norm, self.head = nn.Embedding(5, 4), nn.LayerNorm(4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.table.weight
            self.register_buffer("places", torch.arange(3))
            self.register_buffer("bias", torch.zeros(3))

    model = Model()
    made = narrowed(model, precision)  # type: ignore[arg-type]
    assert made.head.weight is made.table.weight
    kinds = {name: tensor.dtype for name, tensor in made.state_dict().items()}
    half = DTYPES[precision]  # type: ignore[index]
    assert kinds == {
        "table.weight": half,
        "head.weight": half,
        "norm.weight": torch.float32,
        "norm.bias": torch.float32,
        "places": torch.int64,
        "bias": half,
    }
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.int64}
    rounded = Arithmetic("rounded", precision).of(model)  # type: ignore[arg-type]
    assert torch.equal(rounded.table.weight, model.table.weight.to(half).float())


def test_arrays_of_every_type() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
        tensor = torch.tensor([[1, -3], [0, 7]]).to(dtype)
        array = array_of(tensor.T)
        assert array.dtype.itemsize == tensor.element_size()
        assert torch.equal(tensor_of(array), tensor.T)
        assert array.astype(np.float32).tolist() == [[1, 0], [-3, 7]]
    assert tensor_of(np.array([1, 2]), torch.float16).dtype == torch.int64
    assert tensor_of(np.array([1.0, 2.0], np.float32), torch.bfloat16).dtype == torch.bfloat16


# --- T5 --------------------------------------------------------------------------------------------------------------


def _ids(backbone: Backbone) -> dict[str, Tensor]:
    ids = torch.randint(5, 100, (3, 17), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(17) < torch.tensor([17, 5, 12])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-t5-gated"])
@pytest.mark.parametrize("task", ["feature-extraction", "label-words"])
def test_a_shrunk_t5_computes_the_same(name: str, task: str, backbone: Callable[..., Backbone]) -> None:
    """Bit for bit, nearly: the factor is a power of two."""
    import dataclasses

    plain = backbone(name, task)
    shrunk = copy.deepcopy(plain.model)
    with torch.no_grad():
        t5.shrink(shrunk, SHRUNK_BY)
    plugins = random_plugins(plain, 2)
    fitted = copy.deepcopy(plugins)
    with torch.no_grad():
        fitted.shrink(SHRUNK_BY)
    models = [VariatorModel(plain), VariatorModel(dataclasses.replace(plain, model=shrunk))]
    for own in ((None, None), (plugins, fitted)):
        outputs = []
        for model, plugin in zip(models, own, strict=True):
            if plugin is not None:
                model.variator.attach(plugin)
            with torch.inference_mode():
                outputs.append(model.eval()(**_ids(plain)))
        for one, other in zip(*outputs, strict=True):
            assert torch.allclose(one, other, atol=1e-6, rtol=1e-5)
    states = [m.variator(**_ids(plain), keep_states=True).hidden_states[1] for m in models]
    assert torch.allclose(states[0], states[1] * SHRUNK_BY, atol=1e-5)


@pytest.mark.parametrize("name", ["tiny-t5-four", "tiny-t5-gated-four"])
def test_a_shrunk_t5_has_the_same_logits(name: str, tiny: Callable[..., Path]) -> None:
    """With embeddings that make the logits (v1.0), and with a head of its own (v1.1)."""
    model = load_seq2seq(tiny(name, "text2text-generation")).model
    shrunk = copy.deepcopy(model)
    with torch.no_grad():
        t5.shrink(shrunk, SHRUNK_BY)
    ids = torch.randint(5, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted, found = (one(input_ids=ids, decoder_input_ids=ids[:, :4]).logits for one in (model, shrunk))
    assert torch.allclose(wanted, found, atol=1e-5, rtol=1e-5)


def test_a_t5_whose_states_outgrow_fp16(backbone: Callable[..., Backbone]) -> None:
    """Its second layer adds more than fp16 holds; shrunk, it is as near to fp32 as any."""
    import dataclasses

    large = dataclasses.replace(backbone("tiny-t5"), model=copy.deepcopy(backbone("tiny-t5").model))
    with torch.no_grad():
        large.layers[1].layer[1].DenseReluDense.wo.weight.mul_(3e4)

    def last(arithmetic: Arithmetic, *shrink: Callable[[nn.Module, float], None]) -> Tensor:
        model = VariatorModel(dataclasses.replace(large, model=arithmetic.of(large.model, *shrink))).eval()
        with torch.inference_mode(), WideSums():
            return model(**_ids(large))[0]

    half = Arithmetic("half", "fp16")
    wanted = last(Arithmetic("plain"))
    assert VariatorModel(large).variator(**_ids(large), keep_states=True).hidden_states[1].isfinite().all()
    assert not last(half).isfinite().all()
    found = last(half, t5.shrink)
    assert found.dtype == torch.float32
    assert (found - wanted).abs().max() <= 5e-3 * wanted.abs().max()


def test_plugins_need_no_more_range_than_their_host(backbone: Callable[..., Backbone]) -> None:
    plugins = random_plugins(backbone("tiny-t5"), 2)
    fitted = Arithmetic("half", "fp16").of(plugins, VariatorPlugins.shrink)
    assert {tensor.dtype for tensor in fitted.state_dict().values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in fitted.state_dict().values())
    ours, theirs = plugins.mux_layer[0].demux_adapter, fitted.mux_layer[0].demux_adapter
    hidden = backbone("tiny-t5").hidden_size
    assert torch.allclose(theirs.w_out.bias.float() * SHRUNK_BY, ours.w_out.bias, rtol=1e-2)
    assert torch.allclose(theirs.w_in.weight[:, :hidden].float(), ours.w_in.weight[:, :hidden] * SHRUNK_BY, rtol=1e-2)
    assert torch.allclose(theirs.w_in.weight[:, hidden:].float(), ours.w_in.weight[:, hidden:], rtol=1e-2)
