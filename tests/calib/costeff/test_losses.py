"""Losses against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from calib.costeff.losses import (
    answers_error,
    exit_to_exit,
    first_exits_error,
    hidden_error,
    label_error,
    soft_cross_entropy,
)

EVEN, SURE = torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]])  # probabilities 1/2, 1/2 and 3/4, 1/4


def test_soft_cross_entropy() -> None:
    wanted = -(0.5 * math.log(0.75) + 0.5 * math.log(0.25))
    assert float(soft_cross_entropy(SURE, EVEN)) == pytest.approx(wanted)
    assert float(soft_cross_entropy(EVEN, SURE)) == pytest.approx(math.log(2))
    # The mean over rows, so that its size does not depend on the batch.
    assert float(soft_cross_entropy(SURE.repeat(5, 1), EVEN.repeat(5, 1))) == pytest.approx(wanted)


def test_a_teacher_is_matched_best_by_itself() -> None:
    teacher = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    student = teacher.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(soft_cross_entropy(student, teacher), student)
    assert gradient.abs().max() < 1e-7


def test_hidden_error_is_of_real_tokens_only() -> None:
    student = torch.zeros(2, 3, 2)
    teacher = torch.tensor([[[1.0, 1.0], [9.0, 9.0], [9.0, 9.0]], [[2.0, 0.0], [0.0, 0.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 0, 0], [1, 1, 0]])
    # Row 0: one token, mean square 1. Row 1: two tokens, 2 and 0, mean 1. Summed over two states.
    assert float(hidden_error([student, student], [teacher, teacher], mask)) == pytest.approx(2 * (1.0 + 1.0) / 2)


def test_every_exit_counts() -> None:
    labels = torch.tensor([0])
    assert float(label_error([EVEN, SURE], labels)) == pytest.approx(math.log(2) - math.log(0.75))
    soft = [float(soft_cross_entropy(one, SURE)) for one in (EVEN, SURE)]
    assert float(exit_to_exit([EVEN, SURE], [SURE, SURE])) == pytest.approx(sum(soft))
    hard = math.log(2) - math.log(0.75)
    assert float(first_exits_error([EVEN, SURE], SURE, labels)) == pytest.approx((sum(soft) + hard) / 2)
    wanted = 0.9 * sum(soft) + 0.1 * hard
    assert float(answers_error([EVEN, SURE], [SURE, SURE], labels)) == pytest.approx(wanted)


def test_exits_of_another_number_are_refused() -> None:
    with pytest.raises(ValueError):
        exit_to_exit([EVEN], [EVEN, EVEN])
    with pytest.raises(ValueError):
        hidden_error([torch.zeros(1, 1, 1)], [], torch.ones(1, 1))
