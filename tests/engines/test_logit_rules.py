"""Rules against the processors of transformers that they follow, on random texts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation import logits_process as theirs

from compexport.errors import InputError
from engines.logit_rules import NO_RULES, NOTHING, Rules, Ruling

V, EOS, LENGTH, SOURCE = 12, (1, 2), 9, 8
LIMIT = 7  # new tokens; two tokens of each text are its prompt


def applied(rules: Rules, scores: np.ndarray, history: np.ndarray, sources: np.ndarray, count: int) -> np.ndarray:
    batch = len(history)
    lengths = np.full(batch, history.shape[1] - count)
    ruling = Ruling(rules, EOS, lengths, np.full(batch, LIMIT), list(sources))
    return ruling.apply(scores, history, np.arange(batch), count)


def _set(rules: Rules) -> list[str]:
    """What of the rules is not as by default, for a name."""
    default = asdict(NO_RULES)
    return [f"{name}={value}" for name, value in asdict(rules).items() if value != default[name]]


@pytest.mark.parametrize(
    ("rules", "processor"),
    [
        (Rules(repetition_penalty=1.5), lambda source: theirs.RepetitionPenaltyLogitsProcessor(1.5)),
        (Rules(repetition_penalty=0.5), lambda source: theirs.RepetitionPenaltyLogitsProcessor(0.5)),
        (Rules(no_repeat_ngram_size=1), lambda source: theirs.NoRepeatNGramLogitsProcessor(1)),
        (Rules(no_repeat_ngram_size=2), lambda source: theirs.NoRepeatNGramLogitsProcessor(2)),
        (Rules(no_repeat_ngram_size=3), lambda source: theirs.NoRepeatNGramLogitsProcessor(3)),
        (Rules(encoder_no_repeat_ngram_size=1), lambda source: theirs.EncoderNoRepeatNGramLogitsProcessor(1, source)),
        (Rules(encoder_no_repeat_ngram_size=2), lambda source: theirs.EncoderNoRepeatNGramLogitsProcessor(2, source)),
        (
            Rules(bad_words_ids=((3,), (4, 5), (6, 7, 8), (1,))),
            lambda source: theirs.NoBadWordsLogitsProcessor([[3], [4, 5], [6, 7, 8], [1]], list(EOS)),
        ),
        (Rules(min_length=5), lambda source: theirs.MinLengthLogitsProcessor(5, list(EOS))),
        (Rules(min_new_tokens=4), lambda source: theirs.MinNewTokensLengthLogitsProcessor(2, 4, list(EOS))),
        (Rules(suppress_tokens=(3, 9)), lambda source: theirs.SuppressTokensLogitsProcessor([3, 9])),
        (Rules(begin_suppress_tokens=(3, 9)), lambda source: theirs.SuppressTokensAtBeginLogitsProcessor([3, 9], 2)),
        (Rules(forced_bos_id=4), lambda source: theirs.ForcedBOSTokenLogitsProcessor(4)),
        (Rules(forced_eos_id=1), lambda source: theirs.ForcedEOSTokenLogitsProcessor(2 + LIMIT, 1)),
    ],
    ids=lambda value: "-" if callable(value) else ",".join(_set(value)),
)
def test_rules_are_those_of_transformers(rules: Rules, processor: Any) -> None:
    changed = 0
    for seed in range(40):
        random = np.random.default_rng(seed)
        length = int(random.integers(1, LENGTH)) if rules.forced_bos_id is not None else int(random.integers(2, LENGTH))
        # Few tokens, so that they come again.
        history = random.choice([3, 4, 5, 6, 7, 8], (3, length))
        sources = random.integers(3, V, (3, SOURCE))
        scores = random.normal(size=(3, V)).astype(np.float32)
        count = length - 1 if rules.forced_bos_id is not None else length - 2
        wanted = processor(torch.tensor(sources))(torch.tensor(history), torch.tensor(scores)).numpy()
        before = scores.copy()
        np.testing.assert_array_equal(applied(rules, scores, history, sources, count), wanted)
        np.testing.assert_array_equal(scores, before)
        changed += not np.array_equal(wanted, scores)
    assert changed > 2


def test_what_is_forced_may_be_bad_but_not_suppressed() -> None:
    scores, start, source = np.zeros((1, V), np.float32), np.array([[0]]), np.zeros((1, 0), np.int64)
    bad = theirs.NoBadWordsLogitsProcessor([[4]], list(EOS))(torch.tensor(start), torch.tensor(scores))
    wanted = theirs.ForcedBOSTokenLogitsProcessor(4)(torch.tensor(start), bad).numpy()
    found = applied(Rules(forced_bos_id=4, bad_words_ids=((4,),)), scores, start, source, 0)
    np.testing.assert_array_equal(found, wanted)
    assert np.isneginf(applied(Rules(forced_bos_id=4, suppress_tokens=(4,)), scores, start, source, 0)).all()


def test_what_a_row_lacks_is_no_token() -> None:
    """Padded on the left, a row obeys as it would alone."""
    random = np.random.default_rng(0)
    rules = Rules(repetition_penalty=1.5, no_repeat_ngram_size=2, bad_words_ids=((3, 4), (3, 5, 6)), min_length=6)
    scores = random.normal(size=(2, V)).astype(np.float32)
    history = random.choice([3, 4, 5, 6], (2, 7))
    history[1, :4] = NOTHING
    ruling = Ruling(rules, EOS, np.array([5, 1]), np.full(2, LIMIT), [])
    found = ruling.apply(scores, history, np.arange(2), 2)
    alone = Ruling(rules, EOS, np.array([1]), np.full(1, LIMIT), [])
    np.testing.assert_array_equal(found[1:], alone.apply(scores[1:], history[1:, 4:], np.arange(1), 2))


def test_a_forced_beginning_moves_what_must_not_begin() -> None:
    rules = Rules(forced_bos_id=4, begin_suppress_tokens=(4, 5))
    scores = np.zeros((1, V), np.float32)
    source = np.zeros((1, 0), np.int64)
    assert np.flatnonzero(np.isfinite(applied(rules, scores, np.array([[0]]), source, 0))).tolist() == [4]
    assert np.isneginf(applied(rules, scores, np.array([[0, 4]]), source, 1)[0, [4, 5]]).all()
    assert np.isfinite(applied(rules, scores, np.array([[0, 4, 6]]), source, 2)).all()
    # After a prompt of several tokens nothing is forced, and the text begins at once.
    assert np.isneginf(applied(rules, scores, np.array([[0, 9]]), source, 0)[0, [4, 5]]).all()


def test_none_hold_by_default() -> None:
    assert not NO_RULES.hold and Rules(min_length=1).hold and Rules(forced_eos_id=0).hold


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"repetition_penalty": 0.0}, "repetition_penalty: got 0.0, expected a finite number > 0"),
        ({"no_repeat_ngram_size": -1}, "no_repeat_ngram_size: got -1, expected a whole number >= 0"),
        ({"min_length": 2.5}, "min_length: got 2.5, expected a whole number >= 0"),
        ({"bad_words_ids": ((3,), ())}, "bad_words_ids: got an empty word, expected at least one token in each"),
        ({"bad_words_ids": ((3, -1),)}, r"bad_words_ids: got \[3, -1\], expected ids of tokens, whole numbers >= 0"),
        ({"forced_bos_id": -2}, r"forced_bos_id: got \[-2\], expected ids"),
    ],
)
def test_what_makes_no_sense(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        Rules(**changes)


def test_tokens_that_the_model_does_not_have() -> None:
    with pytest.raises(InputError, match="tiny: bad_words_ids: got 12, expected ids from 0 to 11"):
        Rules(bad_words_ids=((3, 12),)).require_known("tiny", V)
