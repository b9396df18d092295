"""Scores of written texts: by hand where they are plain, and as sacrebleu 2.6.0 gives them."""

from __future__ import annotations

import pytest

from calib.text_scores import bleu, edit_distance, edit_share, tokens_13a, wrong_share
from compexport.errors import InputError


def test_bleu_is_sacrebleus() -> None:
    # No four words in a row are right: the smoothing counts.
    ours, wanted = (
        ["the cat sat on a mat", 'dogs, run-2-go 3.5 "x"'],
        ["a cat is on the red mat", "the dogs ran 3.5 - yes"],
    )
    assert bleu(ours, wanted) == pytest.approx(5.044406211143106, abs=1e-9)
    ours = ["ein Mann, der 3,5 m springt.", "zwei &quot;Hunde&quot; laufen 2-mal"]
    wanted = ["ein Mann , welcher 3,5 m weit springt.", 'zwei "Hunde" rennen 2-mal schnell']
    assert bleu(ours, wanted) == pytest.approx(32.65603913102814, abs=1e-9)
    assert bleu(wanted, wanted) == pytest.approx(100.0) and bleu(["x y z w"], ["a b c d"]) == 0.0
    assert bleu([""], ["a b c d"]) == 0.0  # a model may write nothing at all


def test_marks_are_cut_off_but_not_inside_of_numbers() -> None:
    assert tokens_13a('He paid 3,500.50 (in 1990-95), "I think".') == [
        *("He", "paid", "3,500.50", "(", "in", "1990", "-", "95", ")", ",", '"', "I", "think", '"', "."),
    ]
    assert tokens_13a("well-known, isn't it?") == ["well-known", ",", "isn't", "it", "?"]


def test_word_and_symbol_errors() -> None:
    accepted = [["K AE1 T", "K AE0 T"], ["D AO1 G"], ["AH0"]]
    assert wrong_share(["K AE0 T", "D AO1", "AH0"], accepted) == pytest.approx(1 / 3)
    # Each text is measured against the accepted one that is nearest.
    assert edit_share(["K AE0 T", "D AO1", "AH0 AH0"], accepted) == pytest.approx(2 / 7)
    assert edit_distance("kitten", "sitting") == 3 and edit_distance("", "abc") == 3 and edit_distance("abc", "") == 3


def test_as_many_texts_as_references() -> None:
    with pytest.raises(InputError, match="texts to compare"):
        bleu(["a"], [])
    with pytest.raises(InputError, match="texts to compare"):
        wrong_share([], [])
