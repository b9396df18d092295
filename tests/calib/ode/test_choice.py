"""Choosing form and step sizes on texts: what is tried, and that the nearest to the whole model wins."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.data import Examples
from calib.ode.choice import candidate_lists, choose_stepping, equalised, ramp, stepping_on
from compexport.errors import InputError
from exporter.backbone import load_backbone
from exporter.methods.ode import SteppedEncoder, Stepping
from tests.models import TEXTS


@pytest.fixture(scope="module")
def encoder(tiny: Callable[..., Path]) -> SteppedEncoder:
    return SteppedEncoder(load_backbone(tiny("tiny-albert")).model)


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Tensor]]:
    ids = torch.randint(5, 200, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9)[None] < torch.tensor([9, 7, 5, 3])[:, None]).long()
    return [{"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(4)}]


def test_ramps() -> None:
    assert ramp(6, 3, 1) == (2.0, 2.0, 2.0)
    assert ramp(7, 3, 4) == (1.0, 2.0, 4.0)
    assert ramp(6, 1, 4) == (6.0,)


def test_steps_are_short_where_the_density_is_high() -> None:
    assert equalised([1, 1, 1, 1], 2) == (2.0, 2.0)
    assert equalised([3, 1, 1, 1], 2) == (1.0, 3.0)
    assert equalised([1, 1, 4], 3) == (2.0, 0.5, 0.5)
    assert equalised([0, 0, 0, 0], 2) == (2.0, 2.0)
    assert equalised([math.nan, 1, 1, 1], 2) == (2.0, 2.0)
    lonely = equalised([1e9, 1e-9, 1e-9, 1e-9], 4)
    assert sum(lonely) == 4 and min(lonely) > 0.1


def test_candidates_go_as_far_as_each_group() -> None:
    lists = candidate_lists((6, 4), (3, 2), [0.5, 0.1, 0.1, 0.1, 0.1, 0.4, 0.9, 0.1, 0.1, 0.1])
    assert len(lists) == 5
    for steps in lists.values():
        Stepping("block", steps).require_fit((6, 4))
        assert [len(group) for group in steps] == [3, 2]
    assert lists["bend"][1][0] < lists["bend"][1][1]


def test_the_smallest_error_wins(encoder: SteppedEncoder, batches: list[dict[str, Tensor]]) -> None:
    choice = choose_stepping(encoder, batches, 2)
    errors = [one.error for one in choice.tried]
    assert errors == sorted(errors)
    assert {one.stepping.form for one in choice.tried} == {"block", "sublayer"}
    assert {one.name for one in choice.tried} == {"even", "bend", "ramp 0.25", "ramp 0.5", "ramp 2", "ramp 4"}
    assert choice.stepping in (choice.tried[0].stepping, *(one.stepping for one in choice.tried if one.name == "even"))
    assert choose_stepping(encoder, batches, 2) == choice
    feed = {name: batches[0][name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        whole, stepped = (
            encoder(**feed, stepping=one).last_hidden_state[feed["attention_mask"].bool()]
            for one in (None, choice.tried[3].stepping)
        )
    assert float((stepped - whole).norm() / whole.norm()) == pytest.approx(choice.tried[3].error, rel=1e-5)


def test_a_list_must_be_worth_it(encoder: SteppedEncoder, batches: list[dict[str, Tensor]]) -> None:
    """Among lists as good as equal steps, equal ones; the whole model's own steps beat any."""
    nearly = {"nearly": ((2.0, 2.001, 1.999),)}
    assert choose_stepping(encoder, batches, 2, ("block",), nearly).stepping.steps == ((2.0, 2.0, 2.0),)
    perfect = choose_stepping(encoder, batches, 2, ("block",), {"perfect": ((1.0,) * 6,)})
    assert (perfect.stepping.is_full, perfect.tried[0].error) == (True, 0.0)


def test_padding_does_not_count(encoder: SteppedEncoder, batches: list[dict[str, Tensor]]) -> None:
    ids = batches[0]["input_ids"].masked_fill(batches[0]["attention_mask"] == 0, 7)
    for one, other in zip(
        choose_stepping(encoder, batches, 2).tried,
        choose_stepping(encoder, [{**batches[0], "input_ids": ids}], 2).tried,
        strict=True,
    ):
        assert one.error == pytest.approx(other.error, rel=1e-4)


def test_on_texts(tiny: Callable[..., Path]) -> None:
    for name, task in (("tiny-albert-groups", "sequence-classification"), ("tiny-gpt2-shared", "text-generation")):
        backbone = load_backbone(tiny(name, task))
        choice = stepping_on(backbone, Examples(TEXTS), 2, ("sublayer",))
        assert choice.stepping.form == "sublayer"
        assert choice.stepping.n == backbone.num_layers // 2
        assert choice.document()["tried"][0]["error"] > 0
        with pytest.raises(InputError, match="no whole number of steps at ratio 7"):
            stepping_on(backbone, Examples(TEXTS), 7)


def test_a_model_of_no_numbers_is_no_measure(tiny: Callable[..., Path], batches: list[dict[str, Tensor]]) -> None:
    backbone = load_backbone(tiny("tiny-albert"))
    backbone.model.encoder.embedding_hidden_mapping_in.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="states of the model in steps of 1: got NaN or infinite"):
        choose_stepping(SteppedEncoder(backbone.model), batches, 2)
