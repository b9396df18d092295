"""How text becomes ids, as the manifest has it, and ids text."""

from __future__ import annotations

from pydantic import Field, field_validator

from engines.manifest.record import Record

# The places in a template; every other brace stands for itself.
TEXT, TEXT_PAIR = "{text}", "{text_pair}"


class Tokenizer(Record):
    """How text becomes ids. ``inputs`` are the graph inputs the tokenizer feeds, in their order."""

    path: str
    max_length: int
    pad_id: int
    pad_type_id: int = 0
    inputs: list[str]


class LabelWords(Record):
    """How a generating model classifies: the text stands in ``template``, and the word of a label scores for it.

    The graph's ``logits`` are those of ``word_ids``, one per label, after the decoder has read ``decoder_input_ids``.
    """

    words: list[str]
    word_ids: list[int] = Field(description="the first sub-token of each word")
    decoder_input_ids: list[int]
    template: str = Field(description="holds one {text} and at most one {text_pair}")

    @field_validator("template")
    @classmethod
    def _has_its_places(cls, template: str) -> str:
        if template.count(TEXT) != 1 or template.count(TEXT_PAIR) > 1:
            raise ValueError(f"needs one {TEXT} and at most one {TEXT_PAIR}")
        return template
