"""Stepping through shared layers: the properties that need no trained weights (methods.md 4g)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compexport.errors import InputError
from exporter.backbone import Backbone, load_backbone
from exporter.methods.ode import FORMS, SteppedModel, Stepping, output_names, stepping_for_ratio
from exporter.methods.slender import HostFacts
from exporter.methods.variator import VariatorModel
from tests import models

ENCODERS = ["tiny-albert", "tiny-albert-groups"]


@pytest.fixture(scope="module")
def loaded(tiny: Callable[..., Path]) -> Callable[..., Backbone]:
    """``loaded("tiny-albert", "question-answering")``, its norms no longer those of a fresh model."""
    made: dict[tuple[str, str], Backbone] = {}

    def get(name: str = "tiny-albert", task: str = "feature-extraction") -> Backbone:
        if (name, task) not in made:
            made[name, task] = load_backbone(tiny(name, task))
            trained_norms(made[name, task].model)
        return made[name, task]

    return get


def trained_norms(model: torch.nn.Module, seed: int = 0) -> None:
    """Gains of 1 ± 0.3 and biases of ± 0.2: with those of a fresh model, every form looks consistent."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.weight.add_(0.3 * torch.randn(module.weight.shape, generator=generator))
                module.bias.add_(0.2 * torch.randn(module.bias.shape, generator=generator))


def feed_of(
    backbone: Backbone, batch: int = 3, length: int = 9, pad: str = "right", seed: int = 0
) -> dict[str, Tensor]:
    """Random ids [B,S]; every row is padded to another length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, backbone.config.vocab_size, (batch, length), generator=generator)
    real = torch.arange(length)[None] < torch.tensor([length - 2 * row for row in range(batch)])[:, None]
    mask = (real.flip(1) if pad == "left" else real).long()
    feed = {"input_ids": ids, "attention_mask": mask}
    if "token_type_ids" in backbone.input_names:
        feed["token_type_ids"] = (torch.arange(length) > 4).long().expand(batch, length).contiguous()
    return feed


def hugging_face(backbone: Backbone, feed: dict[str, Tensor], **switches: Any) -> tuple[Tensor, ...]:
    """What transformers makes of it."""
    with torch.no_grad():
        found: Any = backbone.model(**feed, **switches)
    names = [name for name in output_names(backbone) if name != "sentence_embedding"]
    return tuple(found[name] for name in names)


# --- property 1 and 2 ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("task", models.HEAD_CLASSES)
@pytest.mark.parametrize("name", ENCODERS)
def test_steps_of_1_are_the_original_bit_by_bit(
    name: str, task: str, form: Any, loaded: Callable[..., Backbone]
) -> None:
    backbone = loaded(name, task)
    feed = feed_of(backbone)
    model = SteppedModel(backbone)
    listed = Stepping(form, tuple((1.0,) * count for count in model.facts.groups))
    for stepping in (Stepping.full(model.facts.groups, form), stepping_for_ratio(model.facts, 1, form), listed):
        with torch.no_grad():
            got = SteppedModel(backbone, stepping)(**feed)
        for ours, theirs in zip(got, hugging_face(backbone, feed), strict=False):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("pad", ["right", "left"])
@pytest.mark.parametrize("form", FORMS)
def test_a_decoder_of_steps_of_1_is_the_original_bit_by_bit(
    form: Any, pad: str, loaded: Callable[..., Backbone]
) -> None:
    backbone = loaded("tiny-gpt2-shared", "text-generation")
    feed = feed_of(backbone, pad=pad)
    stepping = Stepping.full((6,), form)
    with torch.no_grad():
        (logits,) = SteppedModel(backbone, stepping)(**feed)
        cached, cache = SteppedModel(backbone, stepping).decode(**feed)
    # With a cache, keys lie in memory in another order, and so are their sums added up.
    assert torch.equal(logits, *hugging_face(backbone, feed, use_cache=False))
    assert torch.equal(cached, *hugging_face(backbone, feed, use_cache=True))
    assert (len(cache.pairs), cache.length) == (6, 9)


# --- other methods ---------------------------------------------------------------------------------------------------


def test_other_methods_name_this_one(loaded: Callable[..., Backbone]) -> None:
    for name, task in (("tiny-albert", "sequence-classification"), ("tiny-gpt2-shared", "text-generation")):
        with pytest.raises(InputError, match="variator does not fit a model that shares its layers.* --method ode"):
            VariatorModel(loaded(name, task))
        with pytest.raises(InputError, match="COST-EFF does not fit this architecture.*--method ode"):
            HostFacts.of(loaded(name, task))
