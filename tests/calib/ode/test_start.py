"""What a model is trained on: rows of tokens, and models that cannot learn what is asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from calib.data import Examples
from calib.learners import open_learner
from calib.ode.start import open_start
from compexport.errors import InputError
from tests.models import TEXTS


def test_texts_end_in_the_end_token_that_the_vocabulary_has(tiny: Callable[..., Path]) -> None:
    examples = Examples(TEXTS)
    start = open_start(tiny("tiny-gpt2-shared", "text-generation"), examples, "lm", seed=0)
    config = start.learner.backbone.config
    assert all(row["input_ids"][-1] == config.eos_token_id == 2 for row in start.rows(examples, 128))
    config.eos_token_id = 50256  # the kind's default, which a small vocabulary has not
    assert all(max(row["input_ids"]) < config.vocab_size for row in start.rows(examples, 128))


def test_a_decoder_learns_no_labels(tiny: Callable[..., Path]) -> None:
    labelled = Examples(TEXTS[:2], labels=["good", "bad"])
    with pytest.raises(InputError, match="cannot be fine-tuned: got gpt2, expected an encoder; `compexport train ode`"):
        open_learner(tiny("tiny-gpt2-shared", "text-generation"), labelled)
