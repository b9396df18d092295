"""What writing text needs to know of the model, as the manifest has it."""

from __future__ import annotations

from typing import Any, ClassVar, Final

from pydantic import Field, field_validator

from engines.manifest.record import Record

# The settings that ``Generation.defaults`` may hold, as ``generation_config.json`` names them, and what they are where
# it says nothing of them: the likeliest token each time, and nothing forbidden.
GENERATION_SETTINGS: Final[dict[str, Any]] = {
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "max_length": None,
    "max_new_tokens": None,
    "min_length": 0,
    "min_new_tokens": None,
    "no_repeat_ngram_size": 0,
    "encoder_no_repeat_ngram_size": 0,
    "repetition_penalty": 1.0,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "do_sample": False,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
}
_ENDLESS: Final = 1 << 40


class Generation(Record):
    """What generating text needs to know of the model: where to begin, where to stop, how far it reaches.

    Of a model that reads one text and writes another, ``max_positions`` counts the tokens of either.
    """

    later_fields: ClassVar[tuple[str, ...]] = ("decoder_start_ids", "forced_bos_id", "forced_eos_id", "defaults")

    eos_ids: list[int] = Field(description="a row ends with any of these; empty where only the length ends it")
    bos_id: int | None = Field(description="what an empty prompt begins with; null where the model has none")
    pad_id: int = Field(description="stands where the mask is 0")
    max_positions: int | None = Field(
        ge=1, description="tokens of a prompt and what follows it, at most; null where the model has no limit"
    )
    decoder_start_ids: list[int] = Field(
        default=[], description="what a model that reads one text and writes another begins to write with"
    )
    forced_bos_id: int | None = Field(default=None, description="the first token written, whatever the model says")
    forced_eos_id: int | None = Field(default=None, description="the last token of a text as long as may be")
    defaults: dict[str, Any] = Field(
        default={}, description="the model's own settings of generation_config.json, where they are not the usual ones"
    )

    @property
    def positions(self) -> int:
        """``max_positions``; where there is no limit, more than any text has."""
        return _ENDLESS if self.max_positions is None else self.max_positions

    @field_validator("defaults")
    @classmethod
    def _known_settings(cls, defaults: dict[str, Any]) -> dict[str, Any]:
        unknown = defaults.keys() - GENERATION_SETTINGS.keys()
        if unknown:
            raise ValueError(f"no setting of generation is named {min(unknown)}")
        return defaults
