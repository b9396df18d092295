"""From variants to the sessions of their graphs, the same for all backends."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from compexport.errors import InputError, describe
from engines.bundle import Bundle
from engines.cascade import Cascade
from engines.manifest import DECODER_WITH_PAST
from engines.paths import whole_path
from engines.session import Session
from engines.stepper import stepper

GraphSession = TypeVar("GraphSession", bound=Session)
# From a graph, and what it is to be called in messages, to its session, which also gathers what it holds.
OpenGraph = Callable[[str, str], GraphSession]


def known_variants(bundle: Bundle, variants: Sequence[str] | None) -> list[str]:
    """The named variants, all by default; InputError for one that the bundle does not have or that is no one session.

    Those of an encoder and a decoder are opened graph by graph, because variants share them.
    """
    members = bundle.manifest.variants
    unknown = set(variants or ()) - members.keys()
    if unknown:
        expected = f"one of {', '.join(members)}"
        raise InputError(describe("unknown variant", got=", ".join(sorted(unknown)), expected=expected))
    names = list(members) if variants is None else list(variants)
    for name in names:
        if DECODER_WITH_PAST in members[name].graphs:
            raise InputError(describe(f"{name} has several engines", expected="open_graphs, of each of its graphs"))
    return names


def needed_graphs(bundle: Bundle, name: str) -> list[str]:
    """The graphs that ``opened_variants`` opens of a variant."""
    return list(dict.fromkeys(whole_path(bundle.manifest.variants[name])))


def opened_variants(bundle: Bundle, names: Sequence[str], open_graph: OpenGraph[Any]) -> dict[str, Session]:
    """Sessions by variant, of one with exits a ``Cascade``; if one cannot be opened, none stays open.

    The graphs of a step engine are opened once for all of its variants, so closing one of these closes all.
    """
    sessions: dict[str, Session] = {}
    shared: dict[str, Any] = {}
    with _closing(open_graph) as opened:
        for name in names:
            variant = bundle.manifest.variants[name]
            if variant.is_stepper:
                for graph in needed_graphs(bundle, name):
                    shared[graph] = shared.get(graph) or opened(graph, graph)
                sessions[name] = stepper(name, variant, shared)
                continue
            segments = [opened(graph, name) for graph in needed_graphs(bundle, name)]
            sessions[name] = segments[0] if variant.exits is None else Cascade(name, variant.exits, segments)
    return sessions


def opened_graphs(graphs: Sequence[str], open_graph: OpenGraph[GraphSession]) -> dict[str, GraphSession]:
    """Sessions by graph; if one cannot be opened, none stays open."""
    with _closing(open_graph) as opened:
        return {graph: opened(graph, graph) for graph in graphs}


@contextmanager
def _closing(open_graph: OpenGraph[GraphSession]) -> Iterator[OpenGraph[GraphSession]]:
    """``open_graph``, of which an error within closes what it has opened."""
    sessions: list[GraphSession] = []

    def opened(graph: str, name: str) -> GraphSession:
        sessions.append(open_graph(graph, name))
        return sessions[-1]

    try:
        yield opened
    except BaseException:
        for session in sessions:
            session.close()
        raise
