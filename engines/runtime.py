"""Texts in, answers out, in time: one loaded bundle that chooses a member of the family for every request.

Importing this module loads numpy and pydantic only; tokenizers and the backend's library come with the first need.
"""

from __future__ import annotations

import importlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import Any, Protocol, overload

import numpy.typing as npt

from compexport.errors import BundleError, CompexportError, InputError, describe
from engines.answers import Answer, answers, needed_outputs
from engines.bundle import Bundle
from engines.manifest import TensorSpec
from engines.profile import Prediction, Profile, check_count
from engines.selector import Correction, Decision, Quality, decide, select, time_left_ms
from engines.text import EncodedText, Text, TextEncoder

LARGEST_BATCH = 32  # what one engine run takes at most when no profile says what was measured
WARM_UP_LENGTH = 8


class OpenSession(Protocol):
    """What the runtime needs of ``engines.session.Session``."""

    outputs: list[TensorSpec]

    def run(
        self, feeds: Mapping[str, npt.NDArray[Any]], outputs: Sequence[str] | None = None
    ) -> dict[str, npt.NDArray[Any]]:
        """Run once; thread-safe."""

    def close(self) -> None:
        """Release the engine."""


class Backend(Protocol):
    """What the runtime needs of a module in ``engines.backends``."""

    def device_name(self, options: Mapping[str, Any]) -> str:
        """The key of this machine's profile."""

    def open_sessions(
        self, bundle: Bundle, variants: Sequence[str] | None, *, threads: int | None, provider: str
    ) -> Mapping[str, OpenSession]:
        """Sessions by variant, sharing memory. BundleError when an engine fits another version or device."""


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one text. ``output`` is the task's answer as ``run --json`` prints it.

    ``label`` and ``scores`` are None for tasks that do not classify whole texts. ``predicted_ms`` is the engine's
    corrected p99 for the whole request, ``latency_ms`` what the whole request took (tokenising and waiting included),
    ``met_budget`` whether that kept the budget. ``truncated``: the text was longer than the model reads.
    """

    label: str | None
    scores: dict[str, float] | None
    variant: str
    predicted_ms: float | None
    latency_ms: float
    met_budget: bool
    truncated: bool
    output: Answer


@dataclass(frozen=True, slots=True)
class BatchResult:
    """The answers to one request, in the order of its texts; times as in ``Result``."""

    variant: str
    predicted_ms: float | None
    latency_ms: float
    met_budget: bool
    outputs: list[Answer]
    truncated: list[bool]
    decision: Decision

    def document(self) -> dict[str, Any]:
        """What ``run --json`` prints."""
        return {
            "variant": self.variant,
            "predicted_ms": self.predicted_ms,
            "latency_ms": self.latency_ms,
            "met_budget": self.met_budget,
            "outputs": self.outputs,
            "truncated": self.truncated,
            "reason": self.decision.reason,
        }

    def results(self) -> list[Result]:
        """One ``Result`` per text; each carries the times of the whole request."""
        return [
            Result(
                output.get("label"),
                output.get("scores") if "label" in output else None,
                self.variant,
                self.predicted_ms,
                self.latency_ms,
                self.met_budget,
                truncated,
                output,
            )
            for output, truncated in zip(self.outputs, self.truncated, strict=True)
        ]


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
        """``variants``: the members to use, all by default. ``threads``: per engine run; None lets the backend decide.

        Raises InputError for an unknown variant, BundleError for one without an engine of this backend.
        """
        self.bundle = bundle
        self.backend = backend if isinstance(backend, str) else getattr(backend, "NAME", "")
        self._backend: Backend = _load_backend(backend) if isinstance(backend, str) else backend
        self.threads = threads
        self._provider = provider
        self.variants = self._checked_variants(variants)
        self.device = self._backend.device_name({"threads": threads, "provider": provider})
        self.correction = correction if correction is not None else Correction()
        self._lock = threading.RLock()
        self._sessions: dict[str, OpenSession] = {}
        self._encoder: TextEncoder | None = None
        self._closed = False

    @cached_property
    def profile(self) -> Profile | None:
        """This device's latencies, None when not measured. Read at first need, so that a bad table can be replaced.

        Raises BundleError that names the row of a damaged table.
        """
        return _profile(self.bundle, self.device, self.backend)

    @cached_property
    def quality(self) -> Quality:
        """The variants in use, best first. Raises BundleError that names a value that is no number."""
        ratios = {name: self.bundle.manifest.variants[name].ratio for name in self.variants}
        return Quality.from_table(self.bundle.quality(), ratios)

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
        truncate: bool = True,
        waited_ms: float = 0.0,
    ) -> Result | list[Result]:
        """Answer a text or pair with a Result, a list of them with a list; arguments and errors as ``run_batch``.

        A tuple is one pair; a list is a batch of texts or pairs, answered together by one variant.
        """
        texts: Sequence[Text] = [text] if isinstance(text, str | tuple) else text
        batch = self.run_batch(
            texts, budget_ms=budget_ms, ratio=ratio, variant=variant, truncate=truncate, waited_ms=waited_ms
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
        truncate: bool = True,
        waited_ms: float = 0.0,
    ) -> BatchResult:
        """Answer all ``texts`` with one variant, in as many engine runs as the largest measured batch asks for.

        ``budget_ms`` is for all of them together, ``waited_ms`` what of it was spent before this call. ``ratio`` or
        ``variant`` force a member. Raises InputError for an empty, malformed or (``truncate=False``) too long text, a
        budget that is NaN or <= 0, an unknown member, or a budget without a measured profile to keep it by.
        """
        time_left_ms(budget_ms, waited_ms)
        forced = self._forced(ratio, variant)
        self._refuse_unmeasured(budget_ms, forced)
        encoder = self._text_encoder()
        self.warm_up(self._likely(budget_ms, forced))
        started = perf_counter()
        encoded = encoder.encode(texts, truncate=truncate)
        chunks = self._chunks(encoded)
        predictions = self._predictions([[encoded[index] for index in chunk] for chunk in chunks])
        spent_ms = waited_ms + _ms_since(started)
        decision = decide(
            predictions, self.quality, self.correction, budget_ms=budget_ms, waited_ms=spent_ms, forced=forced
        )
        outputs: list[Answer] = [{}] * len(encoded)
        for chunk in chunks:
            answered = self._run(decision.variant, [encoded[index] for index in chunk])
            for index, output in zip(chunk, answered, strict=True):
                outputs[index] = output
        latency_ms = waited_ms + _ms_since(started)
        return BatchResult(
            decision.variant,
            decision.predicted_ms,
            latency_ms,
            budget_ms is None or latency_ms <= budget_ms,
            outputs,
            [one.truncated for one in encoded],
            decision,
        )

    def select(
        self,
        *,
        batch: int = 1,
        length: int | None = None,
        budget_ms: float | None = None,
        waited_ms: float = 0.0,
        ratio: float | None = None,
        variant: str | None = None,
    ) -> Decision:
        """Which variant would answer ``batch`` texts padded to ``length`` tokens now, without running anything.

        ``length=None``: the longest measured. A batch above the largest measured is the sum of its chunks. Raises
        InputError as ``run_batch``.
        """
        forced = self._forced(ratio, variant)
        self._refuse_unmeasured(budget_ms, forced)
        if length is None:
            length = self._longest()
        check_count("batch", batch)
        check_count("length", length)
        return select(
            self.profile,
            self.quality,
            self.correction,
            batch=batch,
            length=length,
            budget_ms=budget_ms,
            waited_ms=waited_ms,
            forced=forced,
        )

    def session(self, variant: str) -> OpenSession:
        """The open engine of a variant, for example to time it; it belongs to the runtime. Opens it at first need."""
        self._known(variant)
        return self._opened([variant])[variant]

    def warm_up(self, variants: Sequence[str] | None = None) -> None:
        """Open the engines (all by default) and run each once, so that the next request is as fast as later ones."""
        self._opened(self.variants if variants is None else variants)

    def close(self) -> None:
        """Close all engines; the runtime then refuses every request."""
        with self._lock:
            self._closed = True
            sessions, self._sessions = self._sessions, {}
            for session in sessions.values():
                session.close()

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # choosing

    def _forced(self, ratio: float | None, variant: str | None) -> str | None:
        """The variant that ``ratio`` or ``variant`` name, None when neither is given."""
        if ratio is not None and variant is not None:
            raise InputError(describe("both ratio and variant were given", expected="one of them"))
        if ratio is None:
            return None if variant is None else self._known(variant)
        ratios = self.quality.ratios
        named = [name for name in self.variants if ratios[name] == ratio]
        if not named:
            choices = ", ".join(f"{value:g}" for value in sorted(set(ratios.values())))
            raise InputError(describe("no variant has this ratio", got=ratio, expected=f"one of {choices}"))
        if len(named) > 1:
            choices = ", ".join(named)
            raise InputError(describe(f"several variants have ratio {ratio:g}", expected=f"one named: {choices}"))
        return named[0]

    def _known(self, variant: str) -> str:
        if variant not in self.variants:
            choices = ", ".join(self.variants)
            raise InputError(describe("unknown variant", got=variant, expected=f"one of {choices}"))
        return variant

    def _refuse_unmeasured(self, budget_ms: float | None, forced: str | None) -> None:
        """A finite budget is only kept by measurement; with one variant there is nothing to choose."""
        if budget_ms is None or budget_ms == float("inf") or forced is not None or len(self.variants) == 1:
            return
        if self.profile is None or not set(self.variants) & set(self.profile.variants):
            measured = ", ".join(self.bundle.profiles()) or "none"
            hint = f"run `compexport bench {self.bundle.path}` on this machine, or name a ratio or variant"
            what = f"a budget needs a latency profile of device {self.device}"
            raise InputError(describe(what, got=f"profiles of: {measured}", hint=hint))

    def _likely(self, budget_ms: float | None, forced: str | None) -> Sequence[str]:
        """The variants that a request may be answered by: under a budget any, else one is known before."""
        if forced is not None:
            return [forced]
        return self.quality.variants[:1] if budget_ms is None else self.variants

    def _longest(self) -> int:
        if self.profile is not None:
            return self.profile.lengths[-1]
        tokenizer = self.bundle.manifest.tokenizer
        return tokenizer.max_length if tokenizer is not None else 1

    def _predictions(self, chunks: Sequence[Sequence[EncodedText]]) -> Mapping[str, Prediction]:
        if self.profile is None:
            return {}
        return self.profile.predict_chunks([_shape(chunk) for chunk in chunks])

    def _chunks(self, encoded: Sequence[EncodedText]) -> list[list[int]]:
        """Positions of the texts of every engine run: neighbours in length, so that little is padded."""
        size = self.profile.largest_batch if self.profile is not None else LARGEST_BATCH
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        return [order[first : first + size] for first in range(0, len(order), size)]

    # running

    def _run(self, variant: str, chunk: Sequence[EncodedText]) -> list[Answer]:
        """One engine run [B, S], timed for the live correction, and its answers."""
        session = self._opened([variant])[variant]
        manifest = self.bundle.manifest
        names = needed_outputs(manifest.task, [output.name for output in session.outputs])
        feeds = self._text_encoder().feeds(chunk)
        started = perf_counter()
        outputs = session.run(feeds, names)
        self._observe(variant, _shape(chunk), _ms_since(started))
        return answers(manifest.task, outputs, chunk, manifest.labels)

    def _observe(self, variant: str, shape: tuple[int, int], engine_ms: float) -> None:
        """Outside the grid a prediction is a bound, so only running longer than it says something of the machine."""
        if self.profile is None or variant not in self.profile.variants:
            return
        expected = self.profile.predict(variant, *shape)
        if not expected.extrapolated or engine_ms > expected.p99_ms:
            self.correction.observe(variant, engine_ms, expected.p50_ms)

    def _opened(self, variants: Sequence[str]) -> Mapping[str, OpenSession]:
        """The sessions, after opening those of ``variants`` that are not yet; each is opened once."""
        sessions = self._sessions
        if all(name in sessions for name in variants):
            return sessions
        with self._lock:
            if self._closed:
                raise CompexportError(describe("the runtime is closed", hint="load the bundle again"))
            missing = [name for name in variants if name not in self._sessions]
            if missing:
                opened = self._backend.open_sessions(
                    self.bundle, missing, threads=self.threads, provider=self._provider
                )
                self._run_once(opened)
                # A new dict instead of an update: readers without the lock see either all or none of them.
                self._sessions = {**self._sessions, **opened}
            return self._sessions

    def _run_once(self, sessions: Mapping[str, OpenSession]) -> None:
        if self.bundle.manifest.tokenizer is None:
            return
        feeds = self._text_encoder().dummy_feeds(1, min(WARM_UP_LENGTH, self.bundle.manifest.tokenizer.max_length))
        for session in sessions.values():
            session.run(feeds)

    def _text_encoder(self) -> TextEncoder:
        if self._encoder is not None:
            return self._encoder
        with self._lock:
            if self._encoder is None:
                manifest = self.bundle.manifest
                if manifest.tokenizer is None:
                    what = f"bundle {self.bundle.path} has no tokenizer, so it cannot read text"
                    raise InputError(describe(what, hint="build it from a model folder with a tokenizer.json"))
                path = self.bundle.file(manifest.tokenizer.path)
                self._encoder = TextEncoder(path, manifest.tokenizer, manifest.task, manifest.label_words)
            return self._encoder

    def _checked_variants(self, variants: Sequence[str] | None) -> tuple[str, ...]:
        manifest = self.bundle.manifest
        known = tuple(manifest.variants)
        names = known if variants is None else tuple(dict.fromkeys(variants))
        if not names or not set(names) <= set(known):
            wrong = ", ".join(name for name in names if name not in known) or "none"
            raise InputError(describe("unknown variant", got=wrong, expected=f"one of {', '.join(known)}"))
        built = {engine.graph for engine in manifest.engines.values() if self.backend in ("", engine.backend)}
        for name in names:
            if not set(manifest.variants[name].graphs.values()) <= built:
                what = f"variant {name} has no engine for backend {self.backend}"
                raise BundleError(describe(what, hint=f"run `compexport build --backend {self.backend}` again"))
        return names


def _load_backend(name: str) -> Backend:
    backends: Any = importlib.import_module("engines.backends")
    backend: Backend = backends.load(name)
    return backend


def _profile(bundle: Bundle, device: str, backend: str) -> Profile | None:
    """This device's profile; one measured with another backend says nothing about this one."""
    table = bundle.profile(device)
    if table is None or table.get("backend", backend) != backend:
        return None
    return Profile.from_table(table)


def _shape(chunk: Sequence[EncodedText]) -> tuple[int, int]:
    """Batch and padded length [B, S] of one engine run."""
    return len(chunk), max(map(len, chunk))


def _ms_since(started: float) -> float:
    return (perf_counter() - started) * 1000.0
