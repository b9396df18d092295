"""An imported COST-EFF model beside the official network: every layer in fp64, every exit in fp32."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor

from exporter.backbone import load_backbone
from exporter.checkpoint import find_checkpoint
from exporter.importers.costeff import import_costeff
from exporter.methods.costeff import CosteffModel, exit_statistics
from exporter.methods.costeff_checkpoint import load_model
from exporter.methods.slender import SlenderShape
from tests.exporter.importers import costeff_official as official
from tests.exporter.importers.costeff_official import Official, Sizes

SIZES = {
    "published": Sizes(),
    "one table": Sizes(rank=None),
    "three classes": Sizes(classes=3),
    "dense poolers": Sizes(pooler_dense=True),
    "uneven": Sizes(heads=(1, 3, 2, 1), neurons=(5, 50, 1, 33)),
    "full width": Sizes(heads=(3, 3), neurons=(50, 50), rank=None),
}
FEEDS = [(13, 5, 16, 1), (8,), (1,), (48, 7)]


def feed(sizes: Sizes, lengths: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, sizes.vocab, mask.shape, generator=generator) * mask
    return ids, mask, torch.randint(0, 2, mask.shape, generator=generator) * mask


def imported(folder: Path) -> CosteffModel:
    """The one model of a checkpoint, as ``build`` loads it."""
    checkpoint = find_checkpoint(folder)
    assert checkpoint is not None and checkpoint.method == "costeff"
    (ratio,) = checkpoint.ratios
    assert {tensor.dtype for tensor in checkpoint.load(ratio).values()} == {torch.float32}
    return load_model(checkpoint, load_backbone(folder), ratio)


@pytest.mark.parametrize("name", SIZES)
def test_every_layer_and_exit(tmp_path: Path, name: str) -> None:
    sizes = SIZES[name]
    tensors = official.random_tensors(sizes)
    import_costeff(official.write(tmp_path / "official", sizes, tensors), None, tmp_path / "out")
    theirs, ours = Official(tensors, sizes), imported(tmp_path / "out")
    assert ours.shape == SlenderShape(sizes.heads, sizes.neurons, sizes.rank)
    exact = imported(tmp_path / "out").double()
    plain = load_backbone(tmp_path / "out").model
    for lengths in FEEDS:
        inputs = feed(sizes, lengths)
        states, logits = theirs.run(*inputs)
        with torch.no_grad():
            fp64, fp32 = exact(*inputs), ours(*inputs)
            full_width = plain(*inputs[:2], token_type_ids=inputs[2]).logits
        for expected, state in zip(states, fp64.hidden_states, strict=True):
            assert_allclose(state, expected, atol=1e-10, rtol=0)
        for expected, exit_logits in zip(logits, fp64.logits, strict=True):
            assert_allclose(exit_logits, expected, atol=1e-10, rtol=0)
        for expected, exit_logits in zip(logits, fp32.logits, strict=True):
            assert_allclose(exit_logits, expected, atol=1e-5, rtol=0)
        # The backbone that was written beside it is the same function.
        assert_allclose(full_width, logits[-1], atol=1e-5, rtol=0)
    spread = np.concatenate(logits)
    assert spread.max() - spread.min() > 0.5  # the comparison is not of zeros


@pytest.mark.parametrize("tau", [-1, 0.0, 0.3, 0.5, 0.6, 0.65, 0.69, 0.7])
def test_rows_leave_where_the_official_rule_lets_them(tmp_path: Path, tau: float) -> None:
    sizes = Sizes()
    tensors = official.random_tensors(sizes)
    import_costeff(official.write(tmp_path / "official", sizes, tensors), None, tmp_path / "out")
    inputs = feed(sizes, tuple(range(1, 41)))
    expected = official.exit_layer(Official(tensors, sizes).run(*inputs)[1], tau)
    with torch.no_grad():
        logits = torch.stack(imported(tmp_path / "out")(*inputs).logits, dim=1)
    sure = exit_statistics(logits).entropy < tau
    sure[:, -1] = True
    assert (sure.int().argmax(dim=1) + 1).tolist() == expected
    if tau < 0:
        assert set(expected) == {4}
    elif tau > np.log(2):
        assert set(expected) == {1}
    elif 0.5 <= tau <= 0.65:
        assert len(set(expected)) > 1


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "safetensors"])
def test_other_ways_of_storing(tmp_path: Path, kind: str) -> None:
    from safetensors.torch import save_file

    sizes = Sizes()
    tensors = official.random_tensors(sizes)
    if kind != "safetensors":
        tensors = {name: tensor.to(getattr(torch, kind)) for name, tensor in tensors.items()}
    folder = official.write(tmp_path / "official", sizes, tensors)
    if kind == "safetensors":
        (folder / "pytorch_model.bin").write_bytes(b"never opened")
        save_file(tensors, folder / "model.safetensors")
    import_costeff(folder, None, tmp_path / "out")
    inputs = feed(sizes, FEEDS[0])
    with torch.no_grad():
        ours = imported(tmp_path / "out")(*inputs).logits
    for expected, exit_logits in zip(Official(tensors, sizes).run(*inputs)[1], ours, strict=True):
        assert_allclose(exit_logits, expected, atol=1e-5, rtol=0)
