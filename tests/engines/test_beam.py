"""The search itself, on scores made by hand; against transformers it is tested on models (``test_seq2seq``)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from engines.beam import Beams, BeamSearch, log_norms

ENDS = (0, 1, 2)


def test_enough_beams_go_on_whichever_tokens_end() -> None:
    """Three ends are the likeliest tokens of every beam: twice as many candidates as beams would all end."""
    search = BeamSearch(
        Beams(2, early_stopping="never", length_penalty=2.0), ENDS, np.zeros((1, 1), np.int64), np.array([4])
    )
    scores = np.log(np.array([[0.22, 0.21, 0.2, 0.15, 0.12, 0.1]], np.float32))
    tokens, parents = search.advance(scores, np.zeros(1, np.float32))
    assert tokens.tolist() == [3, 4] and parents.tolist() == [0, 0]
    assert [one.tokens for one in search.found[0]] == [[0], [1]] and search.rows.tolist() == [0]
    assert all(one.ended for one in search.best(0))


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
def test_a_long_text_is_found_where_short_ones_are_favoured(early_stopping: Any) -> None:
    """Its score, of a hundred tokens to the power of five, is lower than that of any beam of nothing."""
    search = BeamSearch(Beams(2, -5.0, early_stopping), (4,), np.zeros((1, 1), np.int64), np.array([100]))
    scores = np.log(np.array([[0.5, 0.3, 0.2, 1e-3, 1e-30]], np.float32))
    for _ in range(100):
        search.advance(np.repeat(scores, len(search.history), axis=0), np.zeros(len(search.history), np.float32))
    first, _ = search.found[0]
    assert len(first.tokens) == 100 and first.score < -1e9 and not len(search.rows)


def test_norms_make_log_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 40)).astype(np.float32) * 9
    shares = np.exp(logits.astype(np.float64) - log_norms(logits)[:, None])
    np.testing.assert_allclose(shares.sum(axis=1), 1.0, rtol=1e-5)
    logits[1, 3], logits[2, 5] = np.nan, np.inf
    assert np.isfinite(log_norms(logits)).tolist() == [True, False, False]
