"""English prose from installed packages: which paragraphs count, and that the split holds."""

from __future__ import annotations

from calib import docstrings as module
from calib.docstrings import docstrings, prose

DOCUMENTED = '''"""Reads the settings of a program from a file that lies beside it.

Args:
    path: the file

>>> open("x")

Return the value of the named `option`, or the default if there is none."""'''


def test_only_sentences_count() -> None:
    texts = list(prose(DOCUMENTED.strip('"')))
    assert texts == [
        "Reads the settings of a program from a file that lies beside it.",
        "Return the value of the named option, or the default if there is none.",
    ]


def test_texts_repeat_and_the_held_out_ones_are_new() -> None:
    training, held_out = docstrings(300)
    assert (training, held_out) == docstrings(300)
    assert len(training) + len(held_out) == 300
    assert 10 <= len(held_out) <= 60
    seen = {module._opening(text) for text in training}
    assert len(seen) == len(training) and not seen & {module._opening(text) for text in held_out}
    assert docstrings(300, seed=1)[0] != training
