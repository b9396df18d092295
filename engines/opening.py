"""What is open of a loaded bundle: its tokenizer and its engines, each opened at first need, once."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from compexport.errors import CompexportError, InputError, describe
from engines.bundle import Bundle
from engines.causal import CausalGenerator
from engines.members import Members
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
        self._encoder: TextEncoder | None = None
        self._closed = False

    @property
    def is_open(self) -> Sequence[str]:
        """The variants whose engines are open."""
        return tuple(self._sessions)

    def sessions(self, variants: Sequence[str]) -> Mapping[str, OpenSession]:
        """The sessions, after opening those of ``variants`` that are not yet, and running them once.

        Raises CompexportError when all was closed, BundleError as the backend does.
        """
        sessions = self._sessions
        if all(name in sessions for name in variants):
            return sessions
        with self._lock:
            if self._closed:
                raise CompexportError(describe("the runtime is closed", hint="load the bundle again"))
            missing = [name for name in self._with_kin(variants) if name not in self._sessions]
            if missing:
                opened = self.backend.open_sessions(
                    self._bundle, missing, threads=self._threads, provider=self._provider
                )
                self._run_once(opened)
                # A new dict instead of an update: readers without the lock see either all or none of them.
                self._sessions = {**self._sessions, **opened}
            return self._sessions

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
                    path, manifest.tokenizer, manifest.task, manifest.label_words, manifest.generation
                )
            return self._encoder

    def close(self) -> None:
        """Close all engines; every later call for one is refused."""
        with self._lock:
            self._closed = True
            sessions, self._sessions = self._sessions, {}
            for session in sessions.values():
                session.close()

    def _with_kin(self, variants: Sequence[str]) -> list[str]:
        """``variants``, and those in use whose step engine is the same: its graphs are opened once, for all of them."""
        members = self._bundle.manifest.variants
        shared = {graph for name in variants if members[name].is_stepper for graph in members[name].graphs.values()}
        kin = [name for name in self._members.engines if shared & set(members[name].graphs.values())]
        return list(dict.fromkeys((*variants, *kin)))

    def _run_once(self, sessions: Mapping[str, OpenSession]) -> None:
        if self._bundle.manifest.tokenizer is None:
            return
        if (generation := self._bundle.manifest.generation) is not None:
            for name, decoder in sessions.items():
                held: Any = decoder
                CausalGenerator(name, held, generation).warm_up()
            return
        feeds = self.encoder().dummy_feeds(1, min(WARM_UP_LENGTH, self._bundle.manifest.tokenizer.max_length))
        for session in sessions.values():
            session.run(feeds)
