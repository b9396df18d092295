"""Choosing tokens: what stays in the draw, that the draw is fair, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from compexport.errors import InputError
from engines.largest import largest
from engines.sampling import EOS, GREEDY, LENGTH, USUALLY_ENOUGH, Sampler, Sampling, Stop, drawn, probabilities

LOGITS = np.random.default_rng(0).normal(size=(5, 50)).astype(np.float32) * 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 1.0), (7, 1.0), (None, 0.6), (9, 0.8), (1, 0.9), (50, 0.01), (99, 1)]
)
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int | None, top_p: float) -> None:
    import torch
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    ids, scores = torch.zeros(5, 1), torch.tensor(LOGITS.astype(np.float64))
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [] if top_k is None else [TopKLogitsWarper(top_k)]
    steps += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    for step in steps:
        scores = step(ids, scores)
    found = probabilities(LOGITS, Sampling(temperature, top_k, top_p))
    np.testing.assert_allclose(found, scores.softmax(-1).numpy(), atol=1e-12)


def test_equals_stay_together_in_the_top_k() -> None:
    logits = np.array([[1.0, 3.0, 2.0, 2.0, 0.0]])
    assert (probabilities(logits, Sampling(1.0, top_k=2)) > 0).tolist() == [[False, True, True, True, False]]


def test_draws_follow_the_probabilities() -> None:
    shares = np.array([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]])
    points = np.linspace(0, 1, 4000, endpoint=False)
    found = drawn(np.repeat(shares, len(points), axis=0), points)
    assert np.bincount(found, minlength=6).tolist() == [0, 1000, 0, 2000, 1000, 0]
    assert drawn(shares, np.array([np.nextafter(1.0, 0.0)])).tolist() == [4]


def test_the_likeliest_token_needs_no_chance() -> None:
    sampler = Sampler(GREEDY, range(5))
    assert sampler.choose(LOGITS).tolist() == LOGITS.argmax(1).tolist()
    assert sampler.choose(np.array([[1.0, 2.0, 2.0]])).tolist() == [1]


def test_a_row_draws_its_own_numbers() -> None:
    sampling = Sampling(1.0, seed=3)
    sampler, alone = Sampler(sampling, range(5)), Sampler(sampling, [3])
    same = np.repeat(LOGITS[:1], 5, axis=0)
    first, second = sampler.choose(same), sampler.choose(same)
    assert len(set(first.tolist())) > 1, "rows draw independently"
    assert [first[3], second[3]] == [alone.choose(same[:1])[0], alone.choose(same[:1])[0]]
    sampler.keep(np.array([1, 3]))
    assert sampler.choose(same[:2])[1] == alone.choose(same[:1])[0]


def test_ends() -> None:
    stop = Stop((7, 8), 4)
    limits = stop.limits(np.array([2, 9, 10]), 10)
    assert limits.tolist() == [4, 2, 1]
    assert Stop((), 10**30).limits(np.array([2]), 10).tolist() == [9]
    assert stop.ends(np.array([5, 5, 5]), 1, limits) == [None, None, LENGTH]
    assert stop.ends(np.array([8, 5, 7]), 2, limits) == [EOS, LENGTH, EOS]


@pytest.mark.parametrize("temperature", [1e-300, 5e-324])
def test_the_coldest_draw_is_the_likeliest_token(temperature: float) -> None:
    shares = probabilities(LOGITS, Sampling(temperature, top_k=7, top_p=0.9))
    assert shares.argmax(1).tolist() == LOGITS.argmax(1).tolist()
    assert shares.max(1).tolist() == [1.0] * 5


@pytest.mark.parametrize("length", [2.5, float("nan"), True, 0])
def test_a_length_is_a_whole_number(length: float) -> None:
    with pytest.raises(InputError, match=f"max_new_tokens is out of range: got {length}, expected a whole number >= 1"):
        Stop((), length)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"temperature": -0.1}, "temperature: got -0.1, expected a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature: got nan"),
        ({"temperature": 1.0, "top_k": 0}, "top_k is out of range: got 0, expected a whole number >= 1"),
        ({"temperature": 1.0, "top_k": 2.5}, "top_k is out of range: got 2.5, expected a whole number >= 1"),
        ({"temperature": 1.0, "seed": 2.5}, "seed: got 2.5, expected a whole number >= 0"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p: got 0.0, expected a number > 0 and <= 1"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p: got 1.1"),
        ({"temperature": 1.0, "seed": -1}, "seed: got -1, expected a whole number >= 0"),
        ({"top_k": 5}, "only a temperature above 0 draws tokens: got top_k"),
        ({"top_p": 0.5}, "only a temperature above 0 draws tokens: got top_p"),
    ],
)
def test_what_makes_no_sense(changes: dict[str, float], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Sampling(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 7, 90, 2047, 2048, 5000, 32128])
@pytest.mark.parametrize("count", [1, 6, 50, 600])
def test_the_largest_are_those_that_sorting_finds(size: int, count: int) -> None:
    random = np.random.default_rng(size)
    for values in (
        random.normal(size=size),
        random.integers(0, 9, size),
        np.full(size, -np.inf),
        np.arange(size)[::-1],
    ):
        values = values.astype(np.float32)
        values[random.random(size) < 0.3] = -np.inf
        wanted = np.flatnonzero(values >= np.sort(values)[::-1][min(count, size) - 1])
        assert largest(values, count).tolist() == wanted.tolist()


def test_a_nucleus_may_be_wide() -> None:
    """Wider than what is looked through first, and narrower: as sorting all tokens finds it."""
    random = np.random.default_rng(0)
    logits = np.stack([random.normal(size=3000), random.normal(size=3000) * 12])
    whole = probabilities(logits, Sampling(1.0))
    for top_p in (0.1, 0.5, 0.9, 0.999, 1.0 - 1e-12):
        found = probabilities(logits, Sampling(1.0, top_p=top_p))
        for row, shares in zip(found, whole, strict=True):
            ordered = np.sort(shares)[::-1]
            count = int((np.cumsum(ordered) - ordered < top_p).sum())
            assert np.flatnonzero(row).tolist() == np.sort(np.argsort(-shares)[:count]).tolist()
            np.testing.assert_allclose(row[row > 0], shares[row > 0] / ordered[:count].sum(), rtol=1e-9)
    widths = (probabilities(logits, Sampling(1.0, top_p=0.9)) > 0).sum(axis=1)
    assert widths[1] < USUALLY_ENOUGH < widths[0]
