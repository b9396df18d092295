"""Our network beside the official one, on padded batches.

``Official`` runs in fp64 on a residual stream of 1/100 of ours. Errors are relative to the largest value of the
official tensor they are compared with, 0.02 to 0.1 inside the stream; after the last norm, at about 3, absolute.
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor

from exporter.backbone import load_backbone
from exporter.checkpoint import find_checkpoint
from exporter.methods.variator import VariatorEncoder, VariatorPlugins
from tests.exporter.importers.official import Official, Sizes


def padded(sizes: Sizes, lengths: tuple[int, ...] = (13, 5, 16, 1), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and mask of a padded batch whose longest sequence may end in the middle of a group."""
    generator = torch.Generator().manual_seed(seed)
    longest = max(lengths)
    ids = torch.randint(3, sizes.vocab, (len(lengths), longest), generator=generator)
    mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask  # T5's pad id is 0


def whole_groups(ids: Tensor, mask: Tensor, ratio: int) -> tuple[Tensor, Tensor]:
    """What the official code needs: everything padded to a multiple of k."""
    missing = (0, -ids.shape[1] % ratio)
    return torch.nn.functional.pad(ids, missing), torch.nn.functional.pad(mask, missing)


def error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).abs().max() / theirs.abs().max())


def loaded(folder: Path, ratio: int) -> VariatorEncoder:
    """Our encoder with the plugins of a checkpoint, as ``build`` makes it."""
    backbone, checkpoint = load_backbone(folder), find_checkpoint(folder)
    assert checkpoint is not None and checkpoint.pad == "official"
    variator = VariatorEncoder(backbone)
    tensors = checkpoint.load(ratio)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    variator.attach(
        VariatorPlugins.from_tensors(tensors, backbone.hidden_size, backbone.num_layers, "official", str(folder))
    )
    return variator


def compare_encoders(folder: Path, theirs: Official, ratio: int) -> None:
    ours = loaded(folder, ratio)
    for lengths in [(13, 5, 16, 1), (8,), (9, 9), (1,), (40, 31, 8), (7, 7, 3)]:
        ids, mask = padded(theirs.sizes, lengths)
        states = theirs.encode(*whole_groups(ids, mask, ratio))
        with torch.no_grad():
            out = ours(ids, mask, keep_states=True)
        n = ids.shape[1]
        assert (out.last_hidden_state - states[-1][:, :n]).abs().max() <= 1e-4
        for state, expected in zip(out.hidden_states[:-1], states, strict=False):
            assert error(state / 100, expected[:, :n]) <= 1e-4


def compare_logits(folder: Path, theirs: Official, ratio: int) -> None:
    """ModelCenter does not scale the decoder's output: its logits are smaller by 100 H^-0.5."""
    ids, mask = whole_groups(*padded(theirs.sizes), ratio)
    decoder_ids = torch.tensor([[2, theirs.sizes.vocab - 1, 5]]).expand(len(ids), -1)
    expected = theirs.logits(decoder_ids, theirs.encode(ids, mask)[-1], mask)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    with torch.no_grad():
        memory = loaded(folder, ratio)(ids, mask).last_hidden_state
        logits = model(
            encoder_outputs=(memory,), attention_mask=mask, decoder_input_ids=decoder_ids, use_cache=False
        ).logits
    assert error(logits, expected * 100 * theirs.sizes.hidden**-0.5) <= 1e-4


def encoder_error(folder: Path, theirs: Official, ratio: int) -> float:
    ids, mask = padded(theirs.sizes)
    expected = theirs.encode(*whole_groups(ids, mask, ratio))[-1][:, : ids.shape[1]]
    with torch.no_grad():
        return error(loaded(folder, ratio)(ids, mask).last_hidden_state, expected)
