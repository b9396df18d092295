"""A T5 and a BART of 6 + 6 layers that write what a word is spoken like, and a few words."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import writers
from calib.data import Examples

SIZE = writers.Size(encoder=6, decoder=6, hidden=16, ffn=32, heads=2)
SPOKEN = {"a": "AH0", "b": "B", "k": "K", "o": "OW1", "t": "T"}


def pairs(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Words and their phonemes, one for each letter."""
    chance = random.Random(seed)
    words = ["".join(chance.choices("abkot", k=chance.randint(1, 4))) for _ in range(count)]
    return [(word, " ".join(SPOKEN[letter] for letter in word)) for word in words]


def examples(count: int, seed: int = 0) -> Examples:
    sources, targets = zip(*pairs(count, seed), strict=True)
    return Examples(list(sources), targets=list(targets))


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``folder("t5")`` or ``folder("mbart")``: made once per session; do not write into it."""
    made: dict[str, Path] = {}

    def get(name: str = "t5") -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp("writers") / name
            model = {"t5": writers.t5, "mbart": writers.mbart}[name]
            made[name] = writers.make(place, model, writers.spelling_tokenizer, pairs(60), SIZE)
        return made[name]

    return get
