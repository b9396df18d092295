"""How good written texts are: whole answers, edits, and BLEU as translations are compared by.

BLEU: Papineni et al. 2002; tokens as NIST's mteval-v13a script cuts them, and where no n-gram of an order fits, half of
the one before, as sacrebleu has it by default: the numbers are those of ``sacrebleu.corpus_bleu``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from compexport.errors import InputError, describe

ORDERS = 4  # of n-grams
_ENTITIES = {"&quot;": '"', "&amp;": "&", "&lt;": "<", "&gt;": ">"}
_CUTS = (
    # Every ASCII mark stands alone but the apostrophe, the full stop, the comma and the dash ...
    (re.compile(r"""([!"#$%&()*+/:;<=>?@\[\\\]^_`{|}~])"""), r" \1 "),
    # ... full stops and commas do too, but between digits, and dashes after a digit.
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def wrong_share(texts: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """The share of texts that are none of those accepted: the word error rate where each text is a word."""
    _require_pairs(texts, accepted)
    return sum(text not in fine for text, fine in zip(texts, accepted, strict=True)) / len(texts)


def edit_share(texts: Sequence[str], accepted: Sequence[Sequence[str]]) -> float:
    """Edits of symbols, divided by spaces, to the nearest accepted text, in proportion to the symbols of that."""
    _require_pairs(texts, accepted)
    edits = symbols = 0
    for text, fine in zip(texts, accepted, strict=True):
        distance, length = min((edit_distance(text.split(), one.split()), len(one.split())) for one in fine)
        edits, symbols = edits + distance, symbols + length
    return edits / max(1, symbols)


def edit_distance(ours: Sequence[str], wanted: Sequence[str]) -> int:
    """How many symbols must be put in, left out or changed (Levenshtein)."""
    row = list(range(len(wanted) + 1))
    for number, symbol in enumerate(ours, start=1):
        before, row[0] = row[0], number
        for place, other in enumerate(wanted, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (symbol != other))
    return row[-1]


def bleu(texts: Sequence[str], references: Sequence[str]) -> float:
    """BLEU of a whole set of translations, one reference each, from 0 to 100."""
    _require_pairs(texts, references)
    right, given = [0] * ORDERS, [0] * ORDERS
    length = wanted_length = 0
    for text, reference in zip(texts, references, strict=True):
        ours, wanted = tokens_13a(text), tokens_13a(reference)
        length, wanted_length = length + len(ours), wanted_length + len(wanted)
        for order in range(ORDERS):
            found, there = _ngrams(ours, order + 1), _ngrams(wanted, order + 1)
            right[order] += (found & there).total()
            given[order] += found.total()
    if not all(given) or not right[0]:
        return 0.0
    brevity = min(0.0, 1.0 - wanted_length / length)
    return 100.0 * math.exp(brevity + sum(map(math.log, _precisions(right, given))) / ORDERS)


def _precisions(right: Sequence[int], given: Sequence[int]) -> list[float]:
    precisions, smoothing = [], 1.0
    for hits, all_of_them in zip(right, given, strict=True):
        if not hits:
            smoothing *= 2.0
        precisions.append((hits or 1.0 / smoothing) / all_of_them)
    return precisions


def tokens_13a(text: str) -> list[str]:
    """Words and marks as mteval-v13a cuts them."""
    for entity, mark in _ENTITIES.items():
        text = text.replace(entity, mark)
    text = f" {text} "
    for pattern, cut in _CUTS:
        text = pattern.sub(cut, text)
    return text.split()


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def _require_pairs(texts: Sequence[object], wanted: Sequence[object]) -> None:
    if not texts or len(texts) != len(wanted):
        raise InputError(
            describe("texts to compare", got=f"{len(texts)} and {len(wanted)}", expected="as many, above 0")
        )
