"""The shapes a TensorRT plan takes: optimisation profiles, from the named axes of a graph's inputs.

Axes of one name get one size, so that what a graph adds or compares always fits together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compexport.errors import InputError, describe
from engines.backends.trt_options import Range
from engines.manifest import TensorSpec

# For every input the smallest, the usual and the largest shape.
Profile = dict[str, list[list[int]]]

BATCH, LENGTH = Range(1, 8, 32), Range(1, 128, 512)
_BATCH_AXES = ("batch", "kept")
_LENGTH_AXES = ("sequence", "encoder_sequence")
_WRITTEN, _WRITTEN_BEFORE = "decoder_sequence", "past_decoder_sequence"
_PAST, _TOTAL = "past", "total"


def resolved(batch: Range | None, length: Range | None, longest: int | None) -> tuple[Range, Range]:
    """Ranges of batch and length, usual ones where none are given; InputError for more than ``longest`` tokens."""
    if length is None:
        most = longest if longest is not None else LENGTH.high
        length = Range(LENGTH.low, min(LENGTH.usual, most), min(LENGTH.high, most))
    elif longest is not None and length.high > longest:
        raise InputError(describe("--length", got=length, expected=f"at most {longest} tokens, as the model takes"))
    return batch or BATCH, length


def profiles_of(inputs: Sequence[TensorSpec], batch: Range, length: Range) -> list[Profile]:
    """One profile; of a decoder that keeps its past two: a prompt without a past, then one token after a past.

    A decoder that writes another text than is read begins with one token, as a rule, and its cached step reads one,
    after any number of them, whatever the length of what is read. InputError names an axis that is neither a batch nor
    a length.
    """
    named = {axis for spec in inputs for axis in spec.shape if isinstance(axis, str)}
    sizes = {**dict.fromkeys(_BATCH_AXES, batch), **dict.fromkeys(_LENGTH_AXES, length)}
    sizes[_WRITTEN] = Range(1, 1, 1 if _WRITTEN_BEFORE in named else length.high)
    sizes[_WRITTEN_BEFORE] = Range(1, min(length.usual, max(1, length.high - 1)), max(1, length.high - 1))
    if not named <= sizes.keys() | {_PAST, _TOTAL}:
        unknown = min(named - sizes.keys() - {_PAST, _TOTAL})
        raise InputError(describe("an axis without a range", got=unknown, expected=f"one of {', '.join(sizes)}"))
    if _PAST not in named:
        return [_profile(inputs, sizes)]
    prompt = {**sizes, _PAST: Range(0, 0, 0), _TOTAL: length}
    past = Range(length.low, length.usual, max(length.low, length.high - 1))
    past = Range(past.low, min(past.usual, past.high), past.high)
    token = {**sizes, "sequence": Range(1, 1, 1), _PAST: past, _TOTAL: _longer(past)}
    return [_profile(inputs, prompt), _profile(inputs, token)]


def _longer(past: Range) -> Range:
    return Range(past.low + 1, past.usual + 1, past.high + 1)


def _profile(inputs: Sequence[TensorSpec], sizes: Mapping[str, Range]) -> Profile:
    return {
        spec.name: [
            [axis if isinstance(axis, int) else getattr(sizes[axis], end) for axis in spec.shape]
            for end in ("low", "usual", "high")
        ]
        for spec in inputs
    }
