"""Modular Transformers: which tiles an encoder and a decoder are assembled from, and what that costs. Needs no torch.

Tilings, their canonical choice and the strategies are ours, in the spirit of Modular Transformers (arXiv 2306.02379):
the paper says that layers and modules are assembled by deterministic strategies, and not how.

A stack of L layers is covered by tiles in order. A tile of size 1 is the layer itself, one of size g a module that
stands for g consecutive layers and starts at a multiple of g. Every tile has the shape and the cost of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from itertools import groupby
from typing import Any, Literal, get_args

from compexport.errors import InputError, describe

Tiling = tuple[int, ...]
Stack = Literal["encoder", "decoder"]
Strategy = Literal["size-first", "speed-first"]
STACKS: tuple[Stack, ...] = ("encoder", "decoder")
STRATEGIES: tuple[Strategy, ...] = get_args(Strategy)
GRANULARITIES = (2, 3, 4, 6)
USUAL_RATIOS = (1.5, 2, 3, 6)


@dataclass(frozen=True)
class StackFacts:
    """One stack of the base: its ``layers``, the sizes of its modules, and one layer's parameters and widths.

    ``hidden`` is the width of the residual stream, ``inner`` that of all heads together; ``feed_forward`` counts the
    products of one token in the feed-forward network.
    """

    layers: int
    granularities: Tiling
    layer_params: int
    hidden: int
    inner: int
    feed_forward: int

    @property
    def counts(self) -> Tiling:
        """The numbers of tiles that this stack can have, ascending."""
        return _counts(self.layers, self.granularities)


@dataclass(frozen=True)
class ModularFacts:
    """What assemblies are chosen by; ``shared_params`` are in every assembly: embeddings, final norms, the head."""

    encoder: StackFacts
    decoder: StackFacts
    shared_params: int
    vocabulary: int

    @property
    def base_layers(self) -> int:
        """Layers of both stacks."""
        return self.encoder.layers + self.decoder.layers

    def stack(self, name: Stack) -> StackFacts:
        return self.encoder if name == "encoder" else self.decoder

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_document(cls, document: Any, origin: str) -> ModularFacts:
        """From what :meth:`document` made; InputError names ``origin`` otherwise."""
        try:
            stacks = {name: _stack_from(document[name]) for name in STACKS}
            return cls(
                **stacks, shared_params=_whole(document["shared_params"]), vocabulary=_whole(document["vocabulary"])
            )
        except (AttributeError, TypeError, KeyError, ValueError) as error:
            raise InputError(describe(f"{origin}: no facts of a modular model", got=repr(document))) from error


def _stack_from(document: Any) -> StackFacts:
    numbers = {name: _whole(value) for name, value in document.items() if name != "granularities"}
    return StackFacts(**numbers, granularities=tuple(map(_whole, document["granularities"])))


def usable_granularities(layers: int, wanted: Iterable[int] = GRANULARITIES) -> Tiling:
    """Those of the ``wanted`` sizes, ascending, that divide ``layers``; InputError for one that is no size."""
    sizes = sorted(set(wanted))
    wrong = [size for size in sizes if size < 2]
    if wrong:
        raise InputError(describe("granularities", got=wrong[0], expected="whole numbers from 2 on"))
    return tuple(size for size in sizes if layers % size == 0)


@dataclass(frozen=True)
class Assembly:
    """The tiles of both stacks, in order; whether they fit a base says :meth:`require_fit`."""

    encoder: Tiling
    decoder: Tiling

    @classmethod
    def base(cls, facts: ModularFacts) -> Assembly:
        """The base itself: nothing but its own layers."""
        return cls((1,) * facts.encoder.layers, (1,) * facts.decoder.layers)

    @classmethod
    def from_document(cls, document: Any, origin: str) -> Assembly:
        """From what :meth:`document` made; InputError names ``origin`` otherwise."""
        try:
            return cls(*(tuple(map(_whole, document[name])) for name in STACKS))
        except (TypeError, KeyError, ValueError) as error:
            expected = '{"encoder": [tile sizes], "decoder": [tile sizes]}'
            raise InputError(describe(f"{origin}: no assembly", got=repr(document), expected=expected)) from error

    def document(self) -> dict[str, list[int]]:
        """As JSON holds it."""
        return {"encoder": list(self.encoder), "decoder": list(self.decoder)}

    def stack(self, name: Stack) -> Tiling:
        return self.encoder if name == "encoder" else self.decoder

    @property
    def layers(self) -> int:
        """Tiles of both stacks: the layers that the assembly has."""
        return len(self.encoder) + len(self.decoder)

    def ratio(self, facts: ModularFacts) -> float:
        """Layers of the base ÷ layers of the assembly."""
        return facts.base_layers / self.layers

    def require_fit(self, facts: ModularFacts, origin: str = "assembly") -> Assembly:
        """Itself; InputError, with the reason, where a stack of this base cannot be tiled so."""
        for name in STACKS:
            stack = facts.stack(name)
            require_tiling(self.stack(name), stack.layers, stack.granularities, f"{origin}: {name}")
        return self

    def __str__(self) -> str:
        """Counts and sizes, fit for a name: ``e2x1+5x2-d2x6``."""
        return "-".join(name[0] + runs(self.stack(name)) for name in STACKS)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(f"{value} is no size")
    return int(value)


def runs(tiling: Tiling) -> str:
    """Counts and sizes of tiles, fit for a name: ``2x1+5x2``."""
    return "+".join(f"{len(list(run))}x{size}" for size, run in groupby(tiling))


def require_tiling(tiling: Tiling, layers: int, granularities: Tiling, origin: str) -> None:
    """InputError naming the first tile that is of no known size, is misaligned or exceeds the stack, or a short sum."""
    start = 0
    for size in tiling:
        if size != 1 and size not in granularities:
            expected = f"one of {', '.join(map(str, (1, *granularities)))}"
            raise InputError(describe(f"{origin}: tile", got=f"size {size}", expected=expected))
        if start % size:
            expected = f"a multiple of {size}"
            raise InputError(describe(f"{origin}: tile of size {size}", got=f"start {start}", expected=expected))
        start += size
    if start != layers:
        raise InputError(describe(f"{origin}: tiles", got=f"sum {start}", expected=f"{layers}, the layers of the base"))


def spans(tiling: Tiling) -> list[tuple[int, int]]:
    """(start, size) of every tile; a tile stands for the layers start to start + size - 1, from 0."""
    starts = [sum(tiling[:i]) for i in range(len(tiling))]
    return list(zip(starts, tiling, strict=True))


# --- the canonical tiling of a number of tiles -----------------------------------------------------------------------


def canonical(layers: int, tiles: int, granularities: Sequence[int]) -> Tiling:
    """Of the aligned tilings with so many tiles the one with the smallest largest tile, then the smallest sum of
    squared sizes, then the lexicographically smallest. InputError if there is none."""
    sizes = (1, *sorted(granularities))
    for largest in range(1, len(sizes) + 1):
        found = _finest(layers, tiles, sizes[:largest])
        if found is not None:
            return found[1]
    possible = ", ".join(map(str, _counts(layers, sizes[1:])))
    raise InputError(describe(f"tiles of a stack of {layers} layers", got=tiles, expected=f"one of {possible}"))


def _finest(layers: int, tiles: int, sizes: Tiling) -> tuple[int, Tiling] | None:
    """Sum of squares and tiling, the smallest pair of those with ``tiles`` tiles of these sizes."""

    @cache
    def rest(start: int, left: int) -> tuple[int, Tiling] | None:
        if start == layers and left == 0:
            return 0, ()
        if not left or left > layers - start:
            return None
        options = []
        for size in sizes:
            after = rest(start + size, left - 1) if start % size == 0 and start + size <= layers else None
            if after is not None:
                options.append((size * size + after[0], (size, *after[1])))
        return min(options, default=None)

    return rest(0, tiles)


@cache
def _counts(layers: int, granularities: Tiling) -> Tiling:
    reached: list[set[int]] = [set() for _ in range(layers + 1)]
    reached[0].add(0)
    for start in range(layers):
        for size in (1, *granularities):
            if start % size == 0 and start + size <= layers:
                reached[start + size] |= {count + 1 for count in reached[start]}
    return tuple(sorted(reached[layers]))


# --- strategies ------------------------------------------------------------------------------------------------------


def size_first(facts: ModularFacts, budget_params: float) -> Assembly:
    """The most tiles within so many parameters, both stacks as equally deep as they can be, the decoder deeper if not.

    InputError if the smallest assembly is already too much.
    """
    return _size_first(facts, lambda assembly: cost(facts, assembly).params, budget_params, "parameters")


def speed_first(facts: ModularFacts, cost: Callable[[Assembly], float], budget: float) -> Assembly:
    """The first assembly whose ``cost`` is within ``budget``, the decoder made shallower first and all the way.

    For the decoder runs once per token and the encoder once per text. InputError if none is.
    """
    for assembly in _decoder_first(facts):
        if cost(assembly) <= budget:
            return assembly
    raise _too_small("budget", budget, cost(assembly))


def assembly_for_ratio(facts: ModularFacts, ratio: float, strategy: Strategy = "speed-first") -> Assembly:
    """The assembly with at most 1/``ratio`` of the base's layers that ``strategy`` takes; InputError if there is none.

    A ratio is layers of the base ÷ layers of the assembly, both stacks together.
    """
    if strategy not in STRATEGIES:
        raise InputError(describe("strategy", got=repr(strategy), expected=" or ".join(STRATEGIES)))
    layers = layers_for_ratio(facts, ratio)
    if strategy == "speed-first":
        return speed_first(facts, lambda assembly: assembly.layers, layers)
    return _size_first(facts, lambda assembly: assembly.layers, layers, "layers")


def layers_for_ratio(facts: ModularFacts, ratio: float) -> int:
    """How many layers an assembly of ``ratio`` may have, both stacks together; InputError for fewer than there are."""
    if not (math.isfinite(ratio) and ratio >= 1):
        raise InputError(describe("ratio", got=ratio, expected="a number of at least 1"))
    fewest = facts.encoder.counts[0] + facts.decoder.counts[0]
    # A ratio may have been rounded to a few digits on its way here.
    layers = math.floor(facts.base_layers / ratio * (1 + 1e-6))
    if layers < fewest:
        most = f"at most {facts.base_layers / fewest:.3g} for this model"
        raise InputError(describe("ratio", got=f"{ratio:g}", expected=most))
    return layers


def usual_ratios(facts: ModularFacts) -> list[float]:
    """Those of the usual ratios that a base's layers can have."""
    fewest = facts.encoder.counts[0] + facts.decoder.counts[0]
    return [ratio for ratio in USUAL_RATIOS if ratio * fewest <= facts.base_layers]


def _size_first(facts: ModularFacts, cost: Callable[[Assembly], float], budget: float, what: str) -> Assembly:
    ranked = sorted(
        ((e, d) for e in facts.encoder.counts for d in facts.decoder.counts),
        key=lambda pair: (-sum(pair), abs(pair[0] - pair[1]), -pair[1]),
    )
    for encoder, decoder in ranked:
        assembly = _canonical_pair(facts, encoder, decoder)
        if cost(assembly) <= budget:
            return assembly
    smallest = _canonical_pair(facts, facts.encoder.counts[0], facts.decoder.counts[0])
    raise _too_small(what, budget, cost(smallest))


def _decoder_first(facts: ModularFacts) -> Iterator[Assembly]:
    encoders, decoders = facts.encoder.counts[::-1], facts.decoder.counts[::-1]
    for decoder in decoders:
        yield _canonical_pair(facts, encoders[0], decoder)
    for encoder in encoders[1:]:
        yield _canonical_pair(facts, encoder, decoders[-1])


def _canonical_pair(facts: ModularFacts, encoder: int, decoder: int) -> Assembly:
    counts = {"encoder": encoder, "decoder": decoder}
    stacks = [(facts.stack(name), counts[name]) for name in STACKS]
    return Assembly(*(canonical(stack.layers, count, stack.granularities) for stack, count in stacks))


def _too_small(what: str, budget: float, least: float) -> InputError:
    return InputError(describe(f"{what} of an assembly", got=f"{budget:g}", expected=f"at least {least:g}"))


# --- cost ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AssemblyCost:
    """Parameters and MACs of one assembly, for one sequence; n encoder tokens, t tokens in the decoder's cache.

    Look-ups count 0. ``params`` are those of the assembled model, the shared ones included.
    """

    params: int
    assembly: Assembly
    facts: ModularFacts

    def encoder(self, n: int) -> int:
        """MACs of the encoder."""
        stack = self.facts.encoder
        per_token = 4 * stack.hidden * stack.inner + stack.feed_forward
        return len(self.assembly.encoder) * (per_token * n + 2 * stack.inner * n * n)

    def step(self, n: int, t: int) -> int:
        """MACs of one cached decoder step that sees t earlier tokens and itself, the head included."""
        stack = self.facts.decoder
        products = 6 * stack.hidden * stack.inner + stack.feed_forward
        scores = 2 * stack.inner * (t + 1 + n)
        return len(self.assembly.decoder) * (products + scores) + stack.hidden * self.facts.vocabulary

    def first_step(self, n: int) -> int:
        """MACs of the first step, which also makes the cross-attention's keys and values of all n tokens."""
        stack = self.facts.decoder
        return self.step(n, 0) + len(self.assembly.decoder) * 2 * stack.hidden * stack.inner * n

    def generation(self, n: int, tokens: int) -> int:
        """MACs of encoding n tokens and generating ``tokens`` of them, at least one."""
        return self.encoder(n) + self.first_step(n) + sum(self.step(n, t) for t in range(1, tokens))


def cost(facts: ModularFacts, assembly: Assembly) -> AssemblyCost:
    """What an assembly costs."""
    params = facts.shared_params + sum(len(assembly.stack(name)) * facts.stack(name).layer_params for name in STACKS)
    return AssemblyCost(params, assembly, facts)
