"""The stages of a run: the official numbers where the official recipe is asked for, all in proportion otherwise."""

from __future__ import annotations

from dataclasses import replace

import pytest

from calib.costeff.plan import plan, results, seconds_left
from calib.costeff.settings import CosteffSettings
from compexport.errors import InputError
from exporter.methods.costeff import HostFacts, SlenderShape, shape_for_ratio, shape_named

BASE = HostFacts(12, 768, 12, 3072, word_width=768, vocabulary=30522, positions=512, types=2)
OFFICIAL = CosteffSettings(epochs=5, learning_rate=2e-5, heads_per_event=1)


def shapes(*ratios: float) -> dict[float, SlenderShape]:
    return {ratio: shape_for_ratio(BASE, ratio) for ratio in ratios}


@pytest.mark.parametrize(("preset", "events", "passes"), [("a2", 10, (5, 10, 6)), ("a6", 6, (3, 8, 3))])
def test_the_official_recipe(preset: str, events: int, passes: tuple[int, int, int]) -> None:
    stages = plan(OFFICIAL, BASE, {6.0: shape_named(BASE, preset)}, finetuned=False)
    assert [one.name for one in stages[:3]] == ["1-finetune", "2-assist-hidden", "2-assist"]
    assert [one.epochs for one in stages[:3]] == [5, 1, 5]
    slender = [one for one in stages if one.kind == "slenderise"]
    assert len(slender) == events and sum(one.epochs for one in slender) == pytest.approx(passes[0])
    assert {round(one.epochs, 6) for one in slender} == {0.5}
    assert [one.epochs for one in stages[-2:]] == list(passes[1:])
    assert [one.rate for one in stages[:3]] == [2e-5] * 3
    assert [one.rate for one in stages[-2:]] == pytest.approx([3e-5, 2e-5])
    # A period of training, then the event that ends it: the first is at full width, at the rate of no event.
    assert [one.rate for one in slender[:3]] == pytest.approx([1e-5, 1e-5 * 1.12, 1e-5 * 1.12**2])
    assert slender[0].cost == stages[2].cost > slender[1].cost and slender[-1].shape == shape_named(BASE, preset)


def test_each_stage_goes_on_from_another() -> None:
    stages = plan(CosteffSettings(heads_per_event=3), BASE, shapes(4, 2), finetuned=False)
    sources = {one.name: one.source for one in stages}
    assert sources == {
        "1-finetune": None,
        "2-assist-hidden": None,
        "2-assist": "2-assist-hidden",
        "r2-3-event-1": "2-assist",
        "r2-3-event-2": "r2-3-event-1",
        "r2-4-hidden": "r2-3-event-2",
        "r2-5-prediction": "r2-4-hidden",
        "r4-3-event-1": "r2-5-prediction",
        "r4-4-hidden": "r4-3-event-1",
        "r4-5-prediction": "r4-4-hidden",
    }
    # From ratio 2 on, a third of the way to ratio 4 is left: a half and a quarter are kept.
    whole = plan(CosteffSettings(heads_per_event=3), BASE, shapes(4), finetuned=False)
    slenderising = [sum(one.epochs for one in made if one.kind == "slenderise" and one.ratio == 4)
                    for made in (stages, whole)]  # fmt: skip
    assert slenderising[0] == pytest.approx(slenderising[1] / 3, rel=0.01)
    assert len({one.seed for one in stages}) == len(stages)


def test_a_size_that_the_smaller_ratio_has_no_room_for_starts_from_the_assistant() -> None:
    targets = {2.0: SlenderShape.uniform(12, 8, 1200, 384), 3.0: SlenderShape.uniform(12, 2, 1400, 384)}
    stages = plan(CosteffSettings(), BASE, targets, finetuned=True)
    assert {one.source for one in stages if one.name.endswith("event-1")} == {"2-assist"}


def test_a_fine_tuned_model_is_its_own_teacher() -> None:
    kinds = [one.kind for one in plan(CosteffSettings(heads_per_event=12), BASE, shapes(2), finetuned=True)]
    assert kinds == ["assist", "slenderise", "hidden", "prediction"]


@pytest.mark.parametrize(
    ("joint", "ratios", "kinds", "first"),
    [
        (False, (1,), ["exits"], "r1-exits"),
        (True, (1,), ["assist"], "2-assist"),
        (False, (1, 2), ["exits", "assist", "slenderise", "hidden", "prediction"], "r1-exits"),
        (True, (1, 2), ["assist", "slenderise", "hidden", "prediction"], "2-assist"),
    ],
)
def test_ratio_1(joint: bool, ratios: tuple[float, ...], kinds: list[str], first: str) -> None:
    settings = CosteffSettings(joint=joint, heads_per_event=12)
    assert [one.kind for one in plan(settings, BASE, shapes(*ratios), finetuned=True)] == kinds
    assert results(ratios, settings)[1] == first


def test_steps_and_seconds_are_shared_out() -> None:
    stages = plan(CosteffSettings(), BASE, shapes(2, 4), finetuned=False)
    passes = sum(one.epochs for one in stages)
    asked = CosteffSettings(steps=1000)
    steps = [one.steps(asked, 10, passes) for one in stages]
    assert sum(steps) == pytest.approx(1000, abs=len(stages)) and min(steps) > 0
    assert steps[0] == pytest.approx(1000 * stages[0].epochs / passes, abs=1)
    assert [one.steps(CosteffSettings(steps=1), 10, passes) for one in stages] == [1] * len(stages)
    halves = [one.steps(CosteffSettings(batch_size=32), 650, passes) for one in stages]
    assert halves[0] == 2 * 21  # two passes over 21 batches

    timed = CosteffSettings(max_seconds=60)
    shares = [seconds_left(timed, stages, number, 0.0) for number in range(len(stages))]
    assert seconds_left(CosteffSettings(), stages, 0, 0.0) is None
    spent = 0.0
    for number in range(len(stages)):
        spent += seconds_left(timed, stages, number, spent) or 0.0
    assert spent == pytest.approx(60)
    # What one stage leaves, the next ones have.
    assert (seconds_left(timed, stages, 1, 0.0) or 0) > (seconds_left(timed, stages, 1, 10.0) or 0) > 0
    assert shares[-1] == 60 and seconds_left(timed, stages, 3, 100.0) == 0.001


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads_per_event": 0}, "heads_per_event: got 0, expected more than 0"),
        ({"importance_rows": -1}, "importance_rows: got -1"),
        ({"epochs": float("nan")}, "epochs: got nan"),
        ({"max_length": 3}, "max_length: got 3, expected at least 4 tokens"),
        ({"precision": "fp8"}, "unknown precision: got fp8"),
        ({"learning_rate": 2.0}, "learning_rate: got 2.0"),
    ],
)
def test_settings_that_cannot_be_meant(changes: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(CosteffSettings(), **changes).checked()
