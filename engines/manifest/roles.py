"""The roles of a variant's graphs, and what their tensors are called."""

from __future__ import annotations

from typing import Final, Literal

from engines.manifest.tasks import GENERATION, TEXT2TEXT

# Roles of a variant's graphs, and the tensors that only graphs with exits have.
ENCODER, DECODER, ALL_EXITS = "encoder", "decoder", "all-exits"
# A model that reads one text and writes another has a decoder for its first step and one for each step after it.
DECODER_WITH_PAST: Final = "decoder-with-past"
# What a variant of a task that writes text has, neither more nor less; no other task's variant has any of a decoder.
WRITING_ROLES: Final[dict[str, set[str]]] = {
    GENERATION: {DECODER},
    TEXT2TEXT: {ENCODER, DECODER, DECODER_WITH_PAST},
}
# Those of a step engine: the graphs are the same for every number of steps, and the caller runs the loop.
EMBED, STEP, HEAD = "embed", "step", "head"
# A segment's output hidden states are the next one's input, under another name: in one graph, names are unique.
HIDDEN, PREVIOUS, ROWS = "hidden", "previous", "rows"
EXIT_OUTPUTS = ("logits", "entropy", "max_probability", "margin")
# The size of one step, which a step engine's graph reads; and what a decoder keeps of each step, key and value.
STEP_SIZE = "dt"
PAST, PRESENT = "past_key_values", "present"


def segment_role(index: int) -> str:
    """The role of the graph that runs from exit number ``index`` - 1 to the next, counted from 0."""
    return f"segment-{index}"


def prefix_role(layer: int) -> str:
    """The role of the graph that runs from the ids to the exit after ``layer``, counted from 1."""
    return f"prefix-{layer}"


def step_role(group: int, groups: int) -> str:
    """The role of the graph of one step of shared layer number ``group``, from 0; of an only one, without number."""
    return STEP if groups == 1 else f"{STEP}-{group}"


def head_role(step: int) -> str:
    """The role of a step engine's exit head after ``step``, counted from 1."""
    return f"{HEAD}-{step}"


def cache_name(prefix: str, step: int, kind: Literal["key", "value"]) -> str:
    """The name of a decoder's cache entry: ``prefix`` PAST (input) or PRESENT (output), ``step`` counted from 0."""
    return f"{prefix}.{step}.{kind}"


def tile_cache_name(prefix: str, tile: int, stack: Literal["encoder", "decoder"], kind: Literal["key", "value"]) -> str:
    """That of a model that reads one text and writes another: of the text read (``stack`` "encoder") or written."""
    return f"{prefix}.{tile}.{stack}.{kind}"
