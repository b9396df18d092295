"""What a model in steps learns from, on tensors made by hand."""

from __future__ import annotations

import math

import pytest
import torch

from calib.ode.losses import IGNORED, next_tokens, state_distance, token_error
from calib.ode.objectives import Unmask
from calib.ode.sharing import matched_states

MASK = torch.tensor([[1, 1, 1], [1, 0, 0]])


def test_the_distance_is_in_units_of_its_target() -> None:
    target = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    assert state_distance(target, target, MASK) == 0
    assert state_distance(torch.zeros_like(target), target, MASK) == pytest.approx(1.0)
    assert state_distance(3 * target, target, MASK) == pytest.approx(4.0)
    assert state_distance(30 * target, 10 * target, MASK) == pytest.approx(4.0)
    padded = target.clone()
    padded[1, 1:] = 100.0
    assert state_distance(padded, target, MASK) == 0


def test_a_target_of_zeros_gives_a_finite_distance() -> None:
    assert state_distance(torch.ones(2, 3, 4), torch.zeros(2, 3, 4), MASK).isfinite()


def test_only_what_is_asked_for_counts() -> None:
    logits = torch.zeros(2, 3, 5)
    labels = torch.tensor([[1, IGNORED, IGNORED], [IGNORED, 4, IGNORED]])
    logits[0, 1:] = torch.tensor([9.0, -9, 3, 0, 1])
    assert token_error(logits, labels) == pytest.approx(math.log(5))
    assert token_error(logits, torch.full_like(labels, IGNORED)) == 0


def test_the_next_token_is_asked_for_where_there_is_one() -> None:
    ids = torch.tensor([[7, 8, 9], [5, 0, 0]])
    assert next_tokens(ids, MASK).tolist() == [[8, 9, IGNORED], [IGNORED] * 3]


def test_masking_asks_for_real_tokens_alone() -> None:
    goal = Unmask(mask_id=4, special=frozenset({0, 2, 3, 4}), vocabulary=90)
    ids = torch.randint(10, 90, (40, 20), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 15] = 2, 3
    mask = torch.ones_like(ids)
    mask[:, 16:] = ids[:, 16:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    asked = goal.asked(batch, 11)
    labels, changed = asked["labels"], asked["input_ids"]
    wanted = labels != IGNORED
    assert not wanted[:, 0].any() and not wanted[:, 15:].any() and wanted.any(1).all()
    assert (labels[wanted] == ids[wanted]).all() and (changed[~wanted] == ids[~wanted]).all()
    assert 0.1 < wanted[:, 1:15].float().mean() < 0.25
    assert 0.6 < (changed[wanted] == 4).float().mean() < 0.95
    again, other = goal.asked(batch, 11), goal.asked(batch, 12)
    assert torch.equal(again["input_ids"], changed) and not torch.equal(other["input_ids"], changed)


def test_texts_of_special_tokens_alone_ask_for_nothing() -> None:
    goal = Unmask(mask_id=4, special=frozenset({2, 3, 4}), vocabulary=90)
    asked = goal.asked({"input_ids": torch.tensor([[2, 3]]), "attention_mask": torch.ones(1, 2)}, 0)
    assert (asked["labels"] == IGNORED).all()


@pytest.mark.parametrize(
    ("layers", "groups", "pairs"),
    [
        (6, (6,), [(n, n) for n in range(1, 7)]),
        (6, (12,), [(n, 2 * n) for n in range(1, 7)]),
        (4, (2,), [(2, 1), (4, 2)]),
        (4, (2, 2), [(1, 1), (2, 2), (3, 3), (4, 4)]),
        (6, (1, 1), [(3, 1), (6, 2)]),
    ],
)
def test_states_are_matched_group_by_group(layers: int, groups: tuple[int, ...], pairs: list[tuple[int, int]]) -> None:
    assert list(matched_states(layers, groups)) == pairs
