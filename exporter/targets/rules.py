"""What a rule about graphs is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from exporter.targets.places import Opened, Place

# What becomes of a graph that breaks a rule.
NOT_PARSED, NOT_BUILT = "not parsed", "not built"
ANOTHER_RESULT = "built, with another meaning"
TO_KNOW = "to know"
FAILURES = (NOT_PARSED, NOT_BUILT, ANOTHER_RESULT)  # in the order in which they would come
# How a rule is known. What only one of them says has not been seen to happen.
SEEN = "seen with TensorRT-RTX 1.7.1"
SOURCE = "read in the parser's source"
DOCUMENTED = "documented by NVIDIA"


class Fault(NamedTuple):
    """A node that breaks a rule, or None where it is the whole model; and what was found there."""

    place: Place | None
    got: str


@dataclass(frozen=True)
class Rule:
    """One thing that a compiler asks. ``expected`` completes "got …, expected …"."""

    name: str
    expected: str
    outcome: str
    evidence: str
    products: tuple[str, ...]
    faults: Callable[[Opened], Iterable[Fault]]


@dataclass(frozen=True)
class Finding:
    """One break of one rule, as ``compexport inspect --target`` shows it."""

    rule: str
    outcome: str
    evidence: str
    products: tuple[str, ...]
    operator: str
    node: str
    module: str
    function: str
    got: str
    expected: str

    @property
    def stops(self) -> bool:
        """Whether the graph is not, or not rightly, taken."""
        return self.outcome != TO_KNOW


def at_nodes(*operators: str) -> Callable[[Callable[[Place], str | None]], Callable[[Opened], Iterator[Fault]]]:
    """Make a rule of a question about one node of these operators; of all where none is named.

    The function gets each such node, those inside functions and inner graphs too, and says what is wrong there.
    """

    def decorate(ask: Callable[[Place], str | None]) -> Callable[[Opened], Iterator[Fault]]:
        def faults(model: Opened) -> Iterator[Fault]:
            for place in model.places:
                if (not operators or place.node.op_type in operators) and (got := ask(place)) is not None:
                    yield Fault(place, got)

        return faults

    return decorate


def findings(rules: Iterable[Rule], model: Opened) -> list[Finding]:
    """All breaks of ``rules``, in their order."""
    found = []
    for rule in rules:
        for place, got in rule.faults(model):
            node = place.node if place else None
            found.append(
                Finding(
                    rule.name,
                    rule.outcome,
                    rule.evidence,
                    rule.products,
                    operator=node.op_type if node else "",
                    node=(node.name or next(iter(node.output), "")) if node else "",
                    module=place.module if place else "",
                    function=place.function if place else "",
                    got=got,
                    expected=rule.expected,
                )
            )
    return found
