"""What writing reads from memory: the weights of every step, which at batch 1 take longer to fetch than to multiply.

Counted from a model's sizes: matrices alone, in fp32. Look-ups of words, norms and what is kept of a text are left out.
"""

from __future__ import annotations

from collections.abc import Mapping

from exporter.methods.assembly import Assembly, ModularFacts, StackFacts, assembly_for_ratio, usable_granularities

BYTES = 4  # of a number


def bytes_ceiling(sizes: Mapping[str, int], ratio: float, tokens: int) -> float:
    """By how much less is read at ``ratio`` to write so many tokens: the speed-up that reading alone allows.

    ``sizes``: as a configuration of T5's or BART's names them; the assembly is that of speed-first.
    """
    facts = facts_of_sizes(sizes)
    whole, own = Assembly.base(facts), assembly_for_ratio(facts, ratio)
    return bytes_read(facts, whole, tokens) / bytes_read(facts, own, tokens)


def bytes_read(facts: ModularFacts, assembly: Assembly, tokens: int) -> int:
    """For one output of so many tokens: the encoder once, and the decoder and the matrix of words for each of them.

    The first step also makes keys and values of the text that was read, with two more matrices of every tile.
    """
    stack = facts.encoder
    encoder = len(assembly.encoder) * (4 * stack.hidden * stack.inner + stack.feed_forward)
    first = len(assembly.decoder) * 2 * facts.decoder.hidden * facts.decoder.inner
    return BYTES * (encoder + first) + tokens * step_bytes(facts, assembly)


def step_bytes(facts: ModularFacts, assembly: Assembly) -> int:
    """For one more token."""
    stack = facts.decoder
    tile = 6 * stack.hidden * stack.inner + stack.feed_forward
    return BYTES * (len(assembly.decoder) * tile + stack.hidden * facts.vocabulary)


def facts_of_sizes(sizes: Mapping[str, int]) -> ModularFacts:
    """The facts that counting needs; T5's feed-forward network is that of v1.0, of two matrices."""
    hidden, t5 = sizes["d_model"], "num_layers" in sizes
    inner = sizes["num_heads"] * sizes["d_kv"] if t5 else hidden
    encoder, decoder = (
        _stack(sizes["num_layers"] if t5 else sizes[f"{name}_layers"], hidden, inner,
               2 * hidden * (sizes["d_ff"] if t5 else sizes[f"{name}_ffn_dim"]))
        for name in ("encoder", "decoder")
    )  # fmt: skip
    return ModularFacts(encoder, decoder, 0, sizes["vocab_size"])


def _stack(layers: int, hidden: int, inner: int, feed_forward: int) -> StackFacts:
    return StackFacts(layers, usable_granularities(layers), 0, hidden, inner, feed_forward)
