"""What is open of a loaded bundle: its tokenizer and its engines, each opened at first need, once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from compexport.errors import CompexportError, InputError, describe
from engines.bundle import Bundle
from engines.causal import CausalGenerator
from engines.generate import Generator
from engines.manifest import DECODER, DECODER_WITH_PAST, ENCODER, TEXT2TEXT, Generation
from engines.members import Members
from engines.seq2seq import Seq2SeqGenerator
from engines.session import Backend, OpenSession
from engines.text import TextEncoder

WARM_UP_LENGTH = 8


class Opening:
    """Sessions by variant, and the tokenizer. Threads may share it."""

    def __init__(
        self, bundle: Bundle, members: Members, backend: Backend, *, threads: int | None, provider: str
    ) -> None:
        """``threads`` and ``provider``: as the backend takes them."""
        self._bundle = bundle
        self._members = members
        self.backend = backend
        self._threads = threads
        self._provider = provider
        self._lock = threading.RLock()
        self._sessions: dict[str, OpenSession] = {}
        self._graphs: dict[str, OpenSession] = {}  # of variants that are several of them, shared between variants
        self._generators: dict[str, Generator] = {}
        self._encoder: TextEncoder | None = None
        self._closed = False

    @property
    def is_open(self) -> Sequence[str]:
        """The variants whose engines are open."""
        return tuple(self._sessions) or tuple(self._generators)

    def open(self, variants: Sequence[str]) -> None:
        """Open the engines of ``variants`` that are not open yet, and run them once; errors as ``sessions``."""
        if self._bundle.manifest.generation is None:
            self.sessions(variants)
        else:
            self.generators(variants)

    def sessions(self, variants: Sequence[str]) -> Mapping[str, OpenSession]:
        """The sessions, after opening those of ``variants`` that are not yet, and running them once.

        Raises CompexportError when all was closed, BundleError as the backend does, InputError for variants of several
        engines.
        """
        sessions = self._sessions
        if all(name in sessions for name in variants):
            return sessions
        if self._bundle.manifest.task == TEXT2TEXT:
            expected = f"the role {ENCODER}, {DECODER} or {DECODER_WITH_PAST}"
            raise InputError(describe(f"{variants[0]} has several engines", got="none named", expected=expected))
        with self._lock:
            self._require_open()
            missing = [name for name in self._with_kin(variants) if name not in self._sessions]
            if missing:
                opened = self.backend.open_sessions(
                    self._bundle, missing, threads=self._threads, provider=self._provider
                )
                try:
                    self._run_once(opened)
                except BaseException:  # nobody else would close them
                    for session in opened.values():
                        session.close()
                    raise
                # A new dict instead of an update: readers without the lock see either all or none of them.
                self._sessions = {**self._sessions, **opened}
            return self._sessions

    def generators(self, variants: Sequence[str]) -> Mapping[str, Generator]:
        """What writes, after opening ``variants``; errors as ``sessions``, and for a bundle that writes no text."""
        generators = self._generators
        if all(name in generators for name in variants):
            return generators
        manifest = self._bundle.manifest
        if manifest.generation is None:
            raise InputError(describe(f"bundle {self._bundle.path} writes no text", got=manifest.task))
        if manifest.task != TEXT2TEXT:
            self.sessions(variants)
            return self._generators
        with self._lock:
            self._require_open()
            missing = dict.fromkeys(name for name in variants if name not in self._generators)
            made = {name: self._reading_two(name, manifest.generation) for name in missing}
            self._adopt(made)
            return self._generators

    def graph(self, name: str) -> OpenSession:
        """A new session of one graph; the caller closes it."""
        return self.backend.open_graphs(self._bundle, [name], threads=self._threads, provider=self._provider)[name]

    def encoder(self) -> TextEncoder:
        """The tokenizer. Raises InputError for a bundle without one."""
        if self._encoder is not None:
            return self._encoder
        with self._lock:
            if self._encoder is None:
                manifest = self._bundle.manifest
                if manifest.tokenizer is None:
                    what = f"bundle {self._bundle.path} has no tokenizer, so it cannot read text"
                    raise InputError(describe(what, hint="build it from a model folder with a tokenizer.json"))
                path = self._bundle.file(manifest.tokenizer.path)
                self._encoder = TextEncoder(
                    path,
                    manifest.tokenizer,
                    manifest.task,
                    manifest.label_words,
                    manifest.generation,
                    self.backend.shortest_text(self._bundle),
                )
            return self._encoder

    def close(self) -> None:
        """Close all engines; every later call for one is refused."""
        with self._lock:
            self._closed = True
            opened = [*self._sessions.values(), *self._graphs.values()]
            self._sessions, self._graphs, self._generators = {}, {}, {}
            for session in opened:
                session.close()

    def _require_open(self) -> None:
        if self._closed:
            raise CompexportError(describe("the runtime is closed", hint="load the bundle again"))

    def _reading_two(self, name: str, generation: Generation) -> Generator:
        """That of a variant that reads one text and writes another; graphs that others have opened are theirs too."""
        roles = self._bundle.manifest.variants[name].graphs
        missing = [graph for graph in roles.values() if graph not in self._graphs]
        opened = self.backend.open_graphs(self._bundle, missing, threads=self._threads, provider=self._provider)
        self._graphs = {**self._graphs, **opened}
        graphs: Mapping[str, Any] = self._graphs
        encoder, first, cached = (graphs[roles[role]] for role in (ENCODER, DECODER, DECODER_WITH_PAST))
        return Seq2SeqGenerator(name, encoder, first, cached, generation)

    def _adopt(self, made: Mapping[str, Generator]) -> None:
        """Run generators once, so that no request waits for what only a first run does."""
        shortest = self.backend.shortest_text(self._bundle)
        for generator in made.values():
            generator.warm_up(shortest)
        # A new dict instead of an update: readers without the lock see either all or none of them.
        self._generators = {**self._generators, **made}

    def _with_kin(self, variants: Sequence[str]) -> list[str]:
        """``variants``, and those in use whose step engine is the same: its graphs are opened once, for all of them."""
        members = self._bundle.manifest.variants
        shared = {graph for name in variants if members[name].is_stepper for graph in members[name].graphs.values()}
        kin = [name for name in self._members.engines if shared & set(members[name].graphs.values())]
        return list(dict.fromkeys((*variants, *kin)))

    def _run_once(self, sessions: Mapping[str, OpenSession]) -> None:
        if (generation := self._bundle.manifest.generation) is not None:
            decoders: Mapping[str, Any] = sessions
            self._adopt({name: CausalGenerator(name, decoder, generation) for name, decoder in decoders.items()})
            return
        if self._bundle.manifest.tokenizer is None:
            return
        length = max(WARM_UP_LENGTH, self.backend.shortest_text(self._bundle))
        feeds = self.encoder().dummy_feeds(1, min(length, self._bundle.manifest.tokenizer.max_length))
        for session in sessions.values():
            session.run(feeds)
