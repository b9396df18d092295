"""Texts as tokens, in the template of a model that answers in words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from calib.batches import tokenise
from calib.data import Examples
from compexport.errors import InputError
from exporter.backbone import Backbone, load_backbone

SINGLE, PAIRS = Examples(["a", "b"], origin="x.tsv"), Examples(["a", "b"], ["c", "d"], origin="x.tsv")


def with_template(backbone: Backbone, template: str) -> Backbone:
    assert backbone.label_words is not None
    return replace(backbone, label_words=backbone.label_words.model_copy(update={"template": template}))


def test_a_template_takes_what_it_has_places_for(tiny: Callable[..., Path]) -> None:
    backbone = load_backbone(tiny("tiny-t5", "label-words"))
    one, two = with_template(backbone, "a {text}"), with_template(backbone, "{text} a {text_pair}")
    assert len(tokenise(one, SINGLE, 24)) == len(tokenise(two, PAIRS, 24)) == 2
    with pytest.raises(InputError, match=r"^x.tsv: pairs of texts: expected one text in each row, as .*'a {text}'; na"):
        tokenise(one, PAIRS, 24)
    with pytest.raises(InputError, match=r"^x.tsv: single texts: expected a pair in each row, as .*{text_pair}'; name"):
        tokenise(two, SINGLE, 24)
    message = r"^the template '.*' alone is too long: got \d+ tokens, expected at most 4; allow more with --max-length$"
    with pytest.raises(InputError, match=message):
        tokenise(with_template(backbone, "it was a very long film {text}"), SINGLE, 4)
