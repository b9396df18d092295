"""How long the texts are that a model writes, by how long a text it read: measured on real outputs of ratio 1.

``evaluate`` finds the distribution and keeps it in ``quality.json``. Examples are put into groups of similar source
length, and each group keeps how many of its outputs had how many tokens. Letters: B rows of a batch, G groups.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from compexport.errors import BundleError, describe
from engines.profile import check_count
from engines.strict_json import is_finite

GROUPS = 8
SMALLEST_GROUP = 30  # examples; fewer say little of the longest in a hundred
_HINT = "run `compexport evaluate` again"


@dataclass(frozen=True, slots=True)
class Expected:
    """How many tokens the longest text of a batch will have: ``p50`` as often as not, ``p99`` in 99 of 100 batches.

    ``measured``: from real outputs, and not only what is allowed. ``extrapolated``: the text read is longer than any
    that was measured. ``counted_with``: so many beams, where the request asks for another number of them.
    """

    p50: int
    p99: int
    measured: bool = True
    extrapolated: bool = False
    counted_with: int | None = None

    @classmethod
    def at_most(cls, tokens: int) -> Expected:
        """Nothing was measured, so that all that is allowed must be expected."""
        return cls(tokens, tokens, measured=False)

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def at_least(self, tokens: int) -> Expected:
        """No fewer than so many."""
        return replace(self, p50=max(self.p50, tokens), p99=max(self.p99, tokens))


def longest(expected: Sequence[Expected]) -> Expected:
    """What holds for all of several batches."""
    measured, extrapolated = all(one.measured for one in expected), any(one.extrapolated for one in expected)
    p50, p99 = (max(numbers) for numbers in zip(*((one.p50, one.p99) for one in expected), strict=True))
    return Expected(p50, p99, measured, extrapolated, expected[0].counted_with)


@dataclass(frozen=True, slots=True)
class Group:
    """Outputs of sources of similar length. ``source``: their mean length in tokens, ``longest`` the largest.

    ``counts``: how many outputs had so many tokens; ``cut``: how many more were cut before they ended.
    """

    source: float
    longest: int
    counts: Mapping[int, int]
    cut: int

    def quantile(self, share: float, most: int) -> int:
        """The fewest tokens with which this share of the outputs has ended; ``most`` where it takes more."""
        total = self.cut + sum(self.counts.values())
        ended = 0
        for tokens in sorted(self.counts):
            ended += self.counts[tokens]
            if ended >= share * total - 1e-9:
                return min(tokens, most)
        return most


class OutputLengths:
    """The distribution; immutable. Groups are in order of their sources."""

    def __init__(self, groups: Sequence[Group], num_beams: int = 1) -> None:
        """``num_beams``: with which outputs were written. Raises BundleError for no groups, or groups out of order."""
        sources = [group.source for group in groups]
        if not groups or sorted(set(sources)) != sources:
            raise BundleError(describe("lengths of outputs", got=sources, expected="groups of rising source length"))
        self.groups = tuple(groups)
        self.num_beams = num_beams
        self._sources = sources

    @classmethod
    def measured(cls, sources: Sequence[int], written: Sequence[int], cut: Sequence[bool]) -> OutputLengths:
        """From texts of so many tokens each, what was written for them, and whether that was cut before its end."""
        order = sorted(range(len(sources)), key=lambda number: sources[number])
        size = max(SMALLEST_GROUP, -(-len(order) // GROUPS))
        groups, start = [], 0
        while start < len(order):
            end = start + size
            # Sources of one length stay together, and what is left at the end is no group of its own.
            while end < len(order) and sources[order[end]] == sources[order[end - 1]]:
                end += 1
            if len(order) - end < SMALLEST_GROUP:
                end = len(order)
            groups.append(_group(order[start:end], sources, written, cut))
            start = end
        return cls(groups)

    @classmethod
    def from_table(cls, table: Mapping[str, Any] | None) -> OutputLengths | None:
        """From ``quality.json``; None where nothing was measured. Raises BundleError for what is no distribution."""
        section = None if table is None else table.get("output_tokens")
        if section is None:
            return None
        groups = section.get("groups") if isinstance(section, Mapping) else None
        if not isinstance(groups, list):
            raise BundleError(describe("quality table, output_tokens", got=str(section)[:80], hint=_HINT))
        num_beams = section.get("num_beams", 1)  # earlier tables do not say
        if not _whole(num_beams, 1):
            raise BundleError(describe("quality table, output_tokens: num_beams", got=num_beams, hint=_HINT))
        return cls([_read_group(number, entry) for number, entry in enumerate(groups)], num_beams)

    def table(self) -> list[dict[str, Any]]:
        """The groups as ``quality.json`` holds them."""
        return [
            {
                "source": group.source,
                "longest_source": group.longest,
                "tokens": list(group.counts),
                "counts": list(group.counts.values()),
                "cut": group.cut,
            }
            for group in self.groups
        ]

    def expected(self, batch: int, length: int, most: int) -> Expected:
        """The steps that a batch of B texts of ``length`` tokens takes, that is the tokens of its longest output.

        The longest of B is within a length as often as all of B are. Between groups lengths are interpolated; beyond
        the longest source measured they grow in proportion. Never more than ``most``.
        """
        check_count("batch", batch)
        p50, p99 = (self._tokens(share ** (1.0 / batch), length, most) for share in (0.5, 0.99))
        return Expected(p50, max(p50, p99), extrapolated=length > self.groups[-1].longest)

    def _tokens(self, share: float, length: int, most: int) -> int:
        found = [group.quantile(share, most) for group in self.groups]
        right = bisect_right(self._sources, length)
        if right == 0:
            return found[0]
        if right == len(found):
            beyond = max(1.0, length / self.groups[-1].longest)
            return min(most, math.ceil(found[-1] * beyond))
        left, its = self._sources[right - 1], self._sources[right]
        part = (length - left) / (its - left)
        return min(most, math.ceil(found[right - 1] + part * (found[right] - found[right - 1]) - 1e-9))


def _group(chosen: Sequence[int], sources: Sequence[int], written: Sequence[int], cut: Sequence[bool]) -> Group:
    ended = Counter(written[number] for number in chosen if not cut[number])
    lengths = [sources[number] for number in chosen]
    counts = dict(sorted(ended.items()))
    return Group(sum(lengths) / len(lengths), max(lengths), counts, len(chosen) - ended.total())


def _read_group(number: int, entry: object) -> Group:
    """Raises BundleError that says which value of which group cannot be."""
    where = f"quality table, output_tokens, group {number}"
    if not isinstance(entry, Mapping):
        raise BundleError(describe(where, got=entry, expected="an object", hint=_HINT))
    names = ("source", "longest_source", "cut", "tokens", "counts")
    source, longest, cut, tokens, counts = (_any(entry, name) for name in names)
    if not is_finite(source) or source < 1 or not _whole(longest, 1) or longest < source:
        raise BundleError(describe(f"{where}: sources", got=f"{source} up to {longest}", expected="tokens", hint=_HINT))
    listed = isinstance(tokens, list) and isinstance(counts, list) and len(tokens) == len(counts)
    if not listed or not all(_whole(one, 1) for one in (*tokens, *counts)) or not _whole(cut, 0):
        raise BundleError(describe(f"{where}: counts", expected="one from 1 on for each of tokens", hint=_HINT))
    if len(set(tokens)) < len(tokens) or not cut + sum(counts):
        raise BundleError(describe(f"{where}: tokens", got=tokens[:9], expected="each number once, one", hint=_HINT))
    return Group(float(source), longest, dict(sorted(zip(tokens, counts, strict=True))), cut)


def _any(entry: Mapping[Any, Any], name: str) -> Any:
    return entry.get(name)


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
