"""The shapes a TensorRT plan takes: optimisation profiles, from the named axes of a graph's inputs.

Axes of one name get one size, so that what a graph adds or compares always fits together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compexport.errors import InputError, describe
from engines.backends.trt_options import Range
from engines.manifest import PAST, PREVIOUS, TensorSpec

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
    """One profile; of a decoder that keeps its past three: a prompt without a past, one token after a past, and a
    further piece of a prompt, because prompts whose logits are too many are read in pieces.

    A decoder that writes another text than is read begins with one token, as a rule, and its cached step reads one,
    after any number of them, whatever the length of what is read. What is held from run to run may have one row at
    last, because rows leave. InputError names an axis that is neither a batch nor a length.
    """
    if any(spec.name == PREVIOUS or spec.name.startswith(f"{PAST}.") for spec in inputs):
        batch = Range(1, batch.usual, batch.high)
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
    token = {**sizes, "sequence": Range(1, 1, 1), _PAST: past, _TOTAL: _after(past, Range(1, 1, 1))}
    read, piece = Range(1, past.usual, past.high), Range(1, length.usual, length.high)
    more = {**sizes, "sequence": piece, _PAST: read, _TOTAL: _after(read, piece)}
    return [_profile(inputs, prompt), _profile(inputs, token), _profile(inputs, more)]


def shortest_text(inputs: Sequence[TensorSpec], profiles: Sequence[Profile]) -> int:
    """Tokens that every text must have to be read, with padding; 1 for a graph that reads no texts."""
    axes = [(spec.name, place) for spec in inputs for place, axis in enumerate(spec.shape) if axis in _LENGTH_AXES]
    return max((profiles[0][name][0][place] for name, place in axes), default=1)


def _after(past: Range, read: Range) -> Range:
    return Range(past.low + read.low, past.usual + read.usual, past.high + read.high)


def _profile(inputs: Sequence[TensorSpec], sizes: Mapping[str, Range]) -> Profile:
    return {
        spec.name: [
            [axis if isinstance(axis, int) else getattr(sizes[axis], end) for axis in spec.shape]
            for end in ("low", "usual", "high")
        ]
        for spec in inputs
    }
