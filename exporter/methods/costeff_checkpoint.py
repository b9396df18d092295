"""COST-EFF models in method checkpoints: what a ratio's file holds, and the model it makes with its backbone.

A file holds the model's tensors under their official names, less those that are the backbone's own, value for value:
for exits trained on a frozen backbone that leaves the exits.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compexport.errors import InputError, describe
from exporter.backbone import Backbone
from exporter.checkpoint import MethodCheckpoint
from exporter.methods.costeff import CosteffModel, SlenderShape, shape_for_ratio
from exporter.methods.slender_weights import WORDS, WORDS_LEFT, official_names

_FINAL_HEAD = ("bert.pooler.", "classifier.")


def stored_tensors(model: CosteffModel, backbone: Backbone) -> dict[str, Tensor]:
    """What the file of ``model`` holds; the final head, pooler and classifier, is in it whole or not at all."""
    base = official_names(backbone, model.num_labels)
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    same = {name for name, tensor in tensors.items() if name in base and torch.equal(tensor, base[name].cpu())}
    head = {name for name in {*tensors, *base} if name.startswith(_FINAL_HEAD)}
    if not head <= same:
        same -= head
    return {name: tensor for name, tensor in tensors.items() if name not in same}


def completed(tensors: Mapping[str, Tensor], backbone: Backbone) -> dict[str, Tensor]:
    """A file's tensors with those of the backbone that it leaves out."""
    base = official_names(backbone, len(backbone.labels))
    replaced: tuple[str, ...] = _FINAL_HEAD if "classifier.weight" in tensors else ()
    if WORDS_LEFT in tensors:
        replaced = (*replaced, WORDS)
    return {**{name: tensor for name, tensor in base.items() if not name.startswith(replaced or "\0")}, **tensors}


def load_model(checkpoint: MethodCheckpoint, backbone: Backbone, ratio: float) -> CosteffModel:
    """The trained model of one ratio, in eval mode; InputError where file, description and backbone do not agree."""
    origin = f"{checkpoint.folder / checkpoint.files[ratio]}"
    model = CosteffModel.from_tensors(completed(checkpoint.load(ratio), backbone), backbone, origin)
    described = checkpoint.settings.get("shapes", {}).get(str(ratio))
    if described is not None and SlenderShape.from_document(described, str(checkpoint.folder)) != model.shape:
        got, expected = str(SlenderShape.from_document(described, origin)), str(model.shape)
        raise InputError(describe(f"{checkpoint.folder}: widths of ratio {ratio}", got=got, expected=expected))
    if model.num_labels != len(backbone.labels):
        raise InputError(describe(f"{origin}: labels", got=model.num_labels, expected=len(backbone.labels)))
    return model.requires_grad_(False)


def untrained_model(backbone: Backbone, ratio: float, seed: int) -> CosteffModel:
    """The first heads and neurons of the backbone and random exits: as fast as a trained model, and of no use."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CosteffModel.from_backbone(backbone, shape_for_ratio(backbone, ratio)).requires_grad_(False)
