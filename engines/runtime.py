"""Texts in, answers out, in time: one loaded bundle that chooses a member of the family for every request.

Importing this module loads numpy and pydantic only; tokenizers and the backend's library come with the first need.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, overload

import numpy.typing as npt

from compexport.errors import InputError, describe
from engines.answers import Answer, answers, needed_outputs
from engines.anytime import Anytime
from engines.bundle import Bundle
from engines.cascade import LOGITS, Cascade
from engines.causal import CausalGenerator
from engines.choosing import Chooser
from engines.exit_rule import ExitRule
from engines.generate import Generator
from engines.manifest import Generation
from engines.members import Members
from engines.opening import Opening
from engines.points import engine_of
from engines.profile import Profile
from engines.requests import Request, shape_of
from engines.results import BatchResult, Result
from engines.sampling import Sampling
from engines.selector import Correction, Decision, Quality
from engines.session import Backend, OpenSession
from engines.streaming import Stream
from engines.text import Text
from engines.writer import Writer
from engines.writing import next_token_scores, options_asked, written_answers


class Runtime:
    """A loaded bundle; many threads may call one Runtime. A context manager: leaving it closes the engines.

    Engines open at the first request that may need them, outside that request's clock; ``warm_up`` opens them ahead.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        backend: str | Backend = "ort",
        threads: int | None = None,
        provider: str = "cpu",
        variants: Sequence[str] | None = None,
        correction: Correction | None = None,
    ) -> None:
        """``variants``: the members to use, points by name included; all by default.

        ``threads``: per engine run; None lets the backend decide. Raises InputError for an unknown variant, BundleError
        for one without an engine of this backend.
        """
        self.bundle = bundle
        self.backend = backend if isinstance(backend, str) else getattr(backend, "NAME", "")
        opener = _load_backend(backend) if isinstance(backend, str) else backend
        self.threads = threads
        self.device = opener.device_name({"threads": threads, "provider": provider})
        self.members = Members(bundle, self.backend, self.device, variants)
        self.correction = correction if correction is not None else Correction()
        hint = f"run `compexport bench {bundle.path}`"
        self._anytime = Anytime(self.members, self.correction, self.device, hint=hint)
        self._opening = Opening(bundle, self.members, opener, threads=threads, provider=provider)
        self._writer = Writer(bundle.manifest, self.members, self._opening, self._anytime)
        self._chooser = Chooser(bundle, self.members, self.correction, self._opening, self._writer, self.device)

    @property
    def variants(self) -> tuple[str, ...]:
        """The names one may ask for: variants, and operating points of those with exits.

        Raises BundleError for a damaged quality table, which names the points.
        """
        return self.members.names

    @property
    def profile(self) -> Profile | None:
        """This device's latencies, None when not measured. Read at first need, so that a bad table can be replaced.

        Raises BundleError that names the row of a damaged table.
        """
        return self.members.profile

    @property
    def quality(self) -> Quality:
        """The members in use, best first. Raises BundleError that names a value that is no number."""
        return self.members.quality

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        backend: str = "ort",
        threads: int | None = None,
        provider: str = "cpu",
        variants: Sequence[str] | None = None,
    ) -> Runtime:
        """Open the bundle at ``path`` and load it; errors as ``Bundle.open`` and ``Runtime`` raise them."""
        return cls(Bundle.open(path), backend=backend, threads=threads, provider=provider, variants=variants)

    @overload
    def __call__(
        self,
        text: str | tuple[str, str],
        *,
        budget_ms: float | None = None,
        ratio: float | None = None,
        variant: str | None = None,
        rule: ExitRule | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        settings: Mapping[str, Any] | None = None,
        truncate: bool = True,
        waited_ms: float = 0.0,
    ) -> Result: ...

    @overload
    def __call__(
        self,
        text: list[str] | list[tuple[str, str]] | list[Text],
        *,
        budget_ms: float | None = None,
        ratio: float | None = None,
        variant: str | None = None,
        rule: ExitRule | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        settings: Mapping[str, Any] | None = None,
        truncate: bool = True,
        waited_ms: float = 0.0,
    ) -> list[Result]: ...

    def __call__(
        self,
        text: str | tuple[str, str] | list[str] | list[tuple[str, str]] | list[Text],
        *,
        budget_ms: float | None = None,
        ratio: float | None = None,
        variant: str | None = None,
        rule: ExitRule | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        settings: Mapping[str, Any] | None = None,
        truncate: bool = True,
        waited_ms: float = 0.0,
    ) -> Result | list[Result]:
        """Answer a text or pair with a Result, a list of them with a list; arguments and errors as ``run_batch``.

        A tuple is one pair; a list is a batch of texts or pairs, answered together by one variant.
        """
        texts: Sequence[Text] = [text] if isinstance(text, str | tuple) else text
        batch = self.run_batch(
            texts,
            budget_ms=budget_ms,
            ratio=ratio,
            variant=variant,
            rule=rule,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            settings=settings,
            truncate=truncate,
            waited_ms=waited_ms,
        )
        results = batch.results()
        return results if isinstance(text, list) else results[0]

    def run_batch(
        self,
        texts: Sequence[Text],
        *,
        budget_ms: float | None = None,
        ratio: float | None = None,
        variant: str | None = None,
        rule: ExitRule | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        settings: Mapping[str, Any] | None = None,
        truncate: bool = True,
        waited_ms: float = 0.0,
    ) -> BatchResult:
        """Answer all ``texts`` with one variant, in as many engine runs as the largest measured batch asks for.

        ``budget_ms`` is for all of them together, ``waited_ms`` what of it was spent before this call. ``ratio`` or
        ``variant`` force a member, ``rule`` how its rows leave early. With a budget a variant with exits reads the
        clock before every segment, and where the next one would be late its newest exit answers. Raises InputError for
        an empty, malformed or (``truncate=False``) too long text, a budget that is NaN or <= 0, an unknown member, a
        rule that does not fit, or a budget without a measured profile to keep it by.

        A bundle that writes text takes ``max_new_tokens``, ``sampling`` and ``settings``, more of them by the names of
        ``engines.options.NAMES``; where nothing was asked for, the model's own settings hold, and without any 32
        tokens, always the likeliest. With a budget a text ends ("budget") where its next token would be late.
        """
        options = options_asked(self.bundle.manifest, max_new_tokens, sampling, settings)
        forced = self._chooser.forced(ratio, variant, rule)
        request = self._chooser.request(texts, options, budget_ms, forced, rule, truncate, waited_ms)
        outputs: list[Answer] = [{}] * len(texts)
        for number, chunk in enumerate(request.chunks):
            answered = self._run(request, number)
            for index, output in zip(chunk, answered, strict=True):
                outputs[index] = output
        return self._finished(request, outputs)

    def stream(
        self,
        text: Text,
        *,
        budget_ms: float | None = None,
        ratio: float | None = None,
        variant: str | None = None,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        settings: Mapping[str, Any] | None = None,
        truncate: bool = True,
        waited_ms: float = 0.0,
    ) -> Stream:
        """Write one text, piece by piece as it comes; arguments and errors as ``run_batch``.

        Raises InputError, before the first piece, for a bundle that writes no text, and for beams or several texts,
        which come whole.
        """
        options = options_asked(self.bundle.manifest, max_new_tokens, sampling, settings)
        if options is None:
            self._generation()
        request = self._chooser.request(
            [text], options, budget_ms, self._chooser.forced(ratio, variant, None), None, truncate, waited_ms
        )
        return self._writer.stream(request, lambda answer: self._finished(request, [answer]))

    def select(
        self,
        *,
        batch: int = 1,
        length: int | None = None,
        budget_ms: float | None = None,
        waited_ms: float = 0.0,
        ratio: float | None = None,
        variant: str | None = None,
        max_new_tokens: int | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> Decision:
        """Which variant would answer ``batch`` texts padded to ``length`` tokens now, without running anything.

        ``length=None``: the longest measured that leaves room for new tokens. A batch above the largest measured is
        the sum of its chunks. Raises InputError as ``run_batch``.
        """
        options = options_asked(self.bundle.manifest, max_new_tokens, None, settings)
        forced = self._chooser.forced(ratio, variant, None)
        return self._chooser.decision(batch, length, options, budget_ms, forced, waited_ms)

    def session(self, variant: str) -> OpenSession:
        """The open engine of a variant, for example to time it; it belongs to the runtime. Opens it at first need.

        Raises InputError for a variant of several engines (``open_role``, ``generator``).
        """
        engine = engine_of(self.members.known(variant))
        return self._opening.sessions([engine])[engine]

    def generator(self, variant: str) -> Generator:
        """What writes the texts of a variant; it belongs to the runtime. InputError for a bundle that writes none."""
        name = engine_of(self.members.known(variant))
        return self._opening.generators([name])[name]

    def open_role(self, variant: str, role: str) -> OpenSession:
        """A new session of one graph of a variant, for example "all-exits"; the caller closes it.

        Raises InputError for an unknown variant or a role that it does not have. A point's graphs are its variant's.
        """
        name = engine_of(self.members.known(variant))
        graphs = self.bundle.manifest.variants[name].graphs
        if role not in graphs:
            raise InputError(describe(f"{name} has no such graph", got=role, expected=f"one of {', '.join(graphs)}"))
        return self._opening.graph(graphs[role])

    def answers(self, variant: str, texts: Sequence[Text], settings: Mapping[str, Any] | None = None) -> list[Answer]:
        """What a variant answers to ``texts`` at its full depth, in one engine run, whatever it takes.

        Of a bundle that writes texts on, how well it foresees ``texts`` (``engines.writing.next_token_scores``); of one
        that reads one text and writes another what it writes, by ``settings`` as in ``run_batch``.
        Says nothing of texts that are too long (``too_long``). Reads no measured table, so that ``evaluate`` can
        replace a damaged one. Raises InputError as ``run_batch``.
        """
        manifest, encoder = self.bundle.manifest, self._opening.encoder()
        options = options_asked(manifest, None, None, settings)
        encoded = encoder.encode(texts, warn=False)
        if options is None:
            session = self.session(variant)
            names = needed_outputs(manifest.task, [output.name for output in session.outputs])
            return answers(manifest.task, session.run(encoder.feeds(encoded), names), encoded, manifest.labels)
        generator = self.generator(variant)
        if isinstance(generator, CausalGenerator):
            return next_token_scores(generator, encoder, encoded)
        feeds = encoder.feeds(encoded)
        return written_answers(
            encoder, generator.generate(feeds["input_ids"], feeds["attention_mask"], options=options)
        )

    def token_counts(self, texts: Sequence[Text]) -> list[int]:
        """How many tokens each text has, as the model reads it."""
        return [len(one) for one in self._opening.encoder().encode(texts, warn=False)]

    def too_long(self, texts: Sequence[Text]) -> int:
        """How many texts have more tokens than the model reads, so that their rest is cut off."""
        return sum(one.truncated for one in self._opening.encoder().encode(texts, warn=False))

    def run_raw(
        self, session: OpenSession, texts: Sequence[Text], outputs: Sequence[str]
    ) -> tuple[dict[str, npt.NDArray[Any]], list[int]]:
        """What a session of this bundle returns for ``texts``, [B, ...] by name, and their lengths in tokens."""
        encoder = self._opening.encoder()
        encoded = encoder.encode(texts, warn=False)
        return session.run(encoder.feeds(encoded), outputs), [len(one) for one in encoded]

    def warm_up(self, variants: Sequence[str] | None = None) -> None:
        """Open the engines (all by default) and run each once, so that the next request is as fast as later ones."""
        self._opening.open(self.members.engines if variants is None else [engine_of(name) for name in variants])

    def close(self) -> None:
        """Close all engines; the runtime then refuses every request."""
        self._opening.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _finished(self, request: Request, outputs: list[Answer]) -> BatchResult:
        latency_ms = _ms_since(request.began_s)
        met_budget = request.budget_ms is None or latency_ms <= request.budget_ms
        if request.end_s is not None:
            self._anytime.observe_request(request.engine, outputs, late=not met_budget)
        decision, truncated = request.decision, [one.truncated for one in request.encoded]
        return BatchResult(
            decision.variant, decision.predicted_ms, latency_ms, met_budget, outputs, truncated, decision
        )

    def _generation(self) -> Generation:
        generation = self.bundle.manifest.generation
        if generation is None:
            raise InputError(describe(f"bundle {self.bundle.path} writes no text", got=self.bundle.manifest.task))
        return generation

    # running

    def _run(self, request: Request, number: int) -> list[Answer]:
        """One engine run [B, S] of a chunk, timed for the live correction, and its answers."""
        if request.options is not None:
            return self._writer.write(request, number)
        engine, chunk = request.engine, request.texts_of(number)
        session = self._opening.sessions([engine])[engine]
        feeds = self._opening.encoder().feeds(chunk)
        if isinstance(session, Cascade):
            return self._run_cascade(session, request, number, feeds)
        manifest = self.bundle.manifest
        names = needed_outputs(manifest.task, [output.name for output in session.outputs])
        started = perf_counter()
        outputs = session.run(feeds, names)
        engine_ms = _ms_since(started)
        if self.profile is not None and engine in self.profile.variants:
            self._anytime.observe(engine, self.profile.predict(engine, *shape_of(chunk)), engine_ms)
        return answers(manifest.task, outputs, chunk, manifest.labels)

    def _run_cascade(
        self, cascade: Cascade, request: Request, number: int, feeds: Mapping[str, npt.NDArray[Any]]
    ) -> list[Answer]:
        engine, chunk, shapes = request.engine, request.texts_of(number), request.shapes[number:]
        run = cascade.run_exits(feeds, request.rule, self._anytime.deadline(engine, request.end_s, shapes))
        ended = perf_counter()
        self._anytime.observe_segments(engine, shapes[0][1], run)
        manifest = self.bundle.manifest
        given = answers(manifest.task, {LOGITS: run.logits}, chunk, manifest.labels)
        found = [
            {**answer, "exit": layer, "why": why}
            for answer, layer, why in zip(given, run.exit_layer.tolist(), run.why, strict=True)
        ]
        self._anytime.aftercare.observe(len(chunk), _ms_since(ended))
        return found


def _load_backend(name: str) -> Backend:
    backends: Any = importlib.import_module("engines.backends")
    backend: Backend = backends.load(name)
    return backend


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1000.0
