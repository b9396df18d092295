"""What a request asks for, and what the model's own settings say where it asks for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from compexport.errors import InputError
from engines.beam import Beams
from engines.logit_rules import Rules
from engines.manifest import Generation
from engines.options import MAX_NEW_TOKENS, Options, options_for
from engines.sampling import Sampling


def generation(**defaults: Any) -> Generation:
    return Generation(
        eos_ids=[1],
        bos_id=None,
        pad_id=0,
        max_positions=None,
        decoder_start_ids=[0],
        forced_eos_id=2,
        defaults=defaults,
    )


OWN = {"num_beams": 4, "length_penalty": 2.0, "early_stopping": True, "max_length": 62, "no_repeat_ngram_size": 3}
DRAWN = {"do_sample": True, "top_p": 0.9}
RULES = Rules(no_repeat_ngram_size=3, forced_eos_id=2)


@pytest.mark.parametrize(
    ("own", "asked", "wanted"),
    [
        ({}, {}, Options(rules=Rules(forced_eos_id=2))),
        (OWN, {}, Options(62, beams=Beams(4, 2.0, True), rules=RULES, max_length=62)),
        (OWN, {"num_beams": 2, "max_new_tokens": 5}, Options(5, beams=Beams(2, 2.0, True), rules=RULES)),
        (
            OWN,
            {"max_new_tokens": None, "max_length": 9},
            Options(9, beams=Beams(4, 2.0, True), rules=RULES, max_length=9),
        ),
        (OWN, {"temperature": 0.5}, Options(62, Sampling(0.5), rules=RULES, max_length=62)),
        (DRAWN, {}, Options(32, Sampling(1.0, 50, 0.9), rules=Rules(forced_eos_id=2))),
        (DRAWN, {"temperature": 0.7, "seed": 3}, Options(32, Sampling(0.7, 50, 0.9, 3), rules=Rules(forced_eos_id=2))),
        (DRAWN | {"top_k": 0}, {}, Options(32, Sampling(1.0, None, 0.9), rules=Rules(forced_eos_id=2))),
        (DRAWN | {"num_beams": 3}, {}, Options(beams=Beams(3), rules=Rules(forced_eos_id=2))),
        (DRAWN, {"temperature": 0.0}, Options(rules=Rules(forced_eos_id=2))),
        (DRAWN, {"num_beams": 3}, Options(beams=Beams(3), rules=Rules(forced_eos_id=2))),
        ({"temperature": 0.7, "top_k": 9}, {}, Options(rules=Rules(forced_eos_id=2))),
        (
            {"min_length": 9, "bad_words_ids": [[1, 2], [3]]},
            {"min_new_tokens": 4, "decoder_start_ids": [5, 6], "forced_bos_id": 7},
            Options(
                rules=Rules(bad_words_ids=((1, 2), (3,)), min_new_tokens=4, forced_bos_id=7, forced_eos_id=2),
                decoder_start_ids=(5, 6),
            ),
        ),
    ],
)
def test_what_is_asked_for_comes_first(own: dict[str, Any], asked: dict[str, Any], wanted: Options) -> None:
    assert options_for(generation(**own), asked) == wanted


@pytest.mark.parametrize(
    ("own", "asked", "match"),
    [
        ({}, {"beams": 3}, "no setting of generation has this name: got beams, expected bad_words_ids, begin_suppress"),
        ({}, {"max_new_tokens": 0}, "max_new_tokens is out of range: got 0"),
        ({}, {"max_length": 0}, "max_length is out of range: got 0"),
        ({}, {"num_beams": 0}, "num_beams is out of range: got 0"),
        ({}, {"num_beams": 2, "early_stopping": "maybe"}, "early_stopping: got 'maybe', expected true, false or"),
        ({}, {"length_penalty": float("inf")}, "length_penalty: got inf, expected a finite number"),
        (
            {},
            {"num_beams": 2, "temperature": 1.0},
            "drawn one by one, not in beams: got 2 beams; leave one of them out",
        ),
        (
            {},
            {"num_return_sequences": 2},
            "num_return_sequences: got 2, expected at most num_beams, 1, or a temperature",
        ),
        ({}, {"decoder_start_ids": []}, "decoder_start_ids: got none, expected at least one token"),
        ({}, {"top_k": 5}, "only a temperature above 0 draws tokens: got top_k"),
        ({}, {"num_beams": "4"}, "num_beams is out of range: got 4, expected a whole number"),
        ({}, {"temperature": "1"}, "temperature: got '1', expected a number"),
        ({}, {"min_new_tokens": 40}, "min_new_tokens: got 40, expected at most max_new_tokens, 32"),
        ({}, {"length_penalty": 0.5}, "only beams have this setting: got length_penalty, expected num_beams above 1"),
        (
            {"num_beams": 4},
            {"temperature": 1.0, "early_stopping": True},
            "only beams have this setting: got early_stopping",
        ),
    ],
)
def test_what_makes_no_sense(own: dict[str, Any], asked: dict[str, Any], match: str) -> None:
    with pytest.raises(InputError, match=match):
        options_for(generation(**own), asked)


def test_the_usual_length() -> None:
    assert Options().max_new_tokens == MAX_NEW_TOKENS == options_for(generation()).max_new_tokens
