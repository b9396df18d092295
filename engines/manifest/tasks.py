"""What a family is for."""

from __future__ import annotations

from typing import Final, Literal

Task = Literal[
    "feature-extraction",
    "sequence-classification",
    "token-classification",
    "question-answering",
    "label-words",
    "text-generation",
    "text2text-generation",
]
GENERATION: Final = "text-generation"
TEXT2TEXT: Final = "text2text-generation"
