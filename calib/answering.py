"""Running a family's engines over a user's examples, with one count of what is done over all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calib.data import Examples
from calib.exits_search import Exits
from calib.progress import Progress
from engines.answers import label_names, not_finite
from engines.cascade import LOGITS, Cascade
from engines.manifest import ALL_EXITS
from engines.paths import segment_macs
from engines.runtime import Runtime
from engines.session import OpenSession

BATCH = 32  # texts per request


@dataclass(frozen=True)
class Read:
    """What the exits say of some examples; ``labels`` are the last exit's answers, ``tokens`` the examples' lengths."""

    exits: Exits
    labels: list[str]
    tokens: list[int]


class Work:
    """``total`` examples are to be answered; progress says how many are.

    ``settings``: by which texts are written, as ``Runtime.answers`` takes them.
    """

    def __init__(
        self, runtime: Runtime, progress: Progress, total: int, settings: Mapping[str, Any] | None = None
    ) -> None:
        self.runtime = runtime
        self._settings = settings
        self._progress, self._done, self._total = progress, 0, total

    def answers(self, variant: str, examples: Examples) -> list[Mapping[str, Any]]:
        """One answer per example, in order."""
        given = _answers(self.runtime, examples, variant, self._settings, self._report)
        self._done += len(examples)
        return given

    def read(self, variant: str, examples: Examples, statistic: str) -> Read:
        """What every exit of a variant says of each example."""
        found = _read_exits(self.runtime, variant, examples, statistic, self._report)
        self._done += len(examples)
        return found

    def _report(self, done: int) -> None:
        self._progress("evaluate", self._done + done, self._total)


def _answers(
    runtime: Runtime,
    examples: Examples,
    variant: str,
    settings: Mapping[str, Any] | None,
    report: Callable[[int], None],
) -> list[Mapping[str, Any]]:
    """One answer per example, in order."""
    inputs = examples.inputs
    answers: list[Mapping[str, Any]] = [{}] * len(inputs)
    done = 0
    for chosen in _batches(inputs):
        outputs = runtime.answers(variant, [inputs[index] for index in chosen], settings)
        for index, output in zip(chosen, outputs, strict=True):
            answers[index] = output
        done += len(chosen)
        report(done)
    return answers


def _batches(inputs: Sequence[str | tuple[str, str]]) -> list[list[int]]:
    """Which inputs go together: those of similar length."""
    order = sorted(range(len(inputs)), key=lambda index: len("".join(inputs[index])))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def _read_exits(
    runtime: Runtime, variant: str, examples: Examples, statistic: str, report: Callable[[int], None]
) -> Read:
    """Run all exits of ``variant`` over ``examples``; the truth is the last exit's own answer, for now.

    Only the exits that the variant has are kept. ``report`` is told how many examples are done. Raises CompexportError
    for logits that are not finite.
    """
    manifest = runtime.bundle.manifest
    inputs, batches = examples.inputs, _batches(examples.inputs)
    parts: dict[str, list[Any]] = {LOGITS: [], statistic: []}
    tokens: list[int] = []
    session, columns = _all_exits(runtime, variant)
    try:
        for chosen in batches:
            outputs, lengths = runtime.run_raw(session, [inputs[index] for index in chosen], list(parts))
            for name, values in outputs.items():
                if not np.isfinite(values).all():
                    raise not_finite(f"{variant}: {name} of its exits hold")
                parts[name].append(values[:, columns])
            tokens += lengths
            report(len(tokens))
    finally:
        session.close()
    back = np.argsort([index for chosen in batches for index in chosen])
    logits, statistics = (np.concatenate(parts[name])[back] for name in (LOGITS, statistic))
    in_order = np.array(tokens)[back].tolist()
    macs = np.cumsum([segment_macs(manifest, variant, length) for length in in_order], axis=1, dtype=np.float64)
    labels = label_names(manifest.labels, logits.shape[-1])
    answers = logits[:, -1].argmax(axis=1)
    return Read(Exits(logits, statistics, answers, macs), [labels[index] for index in answers], in_order)


def _all_exits(runtime: Runtime, variant: str) -> tuple[OpenSession, list[int]]:
    """A session of several exits at once, to be closed, and which of its columns are the variant's exits."""
    entry = runtime.bundle.manifest.variants[variant]
    assert entry.exits is not None
    if ALL_EXITS in entry.graphs:
        return runtime.open_role(variant, ALL_EXITS), [layer - 1 for layer in entry.exits]
    cascade = runtime.session(variant)  # a step engine, which has no such graph
    assert isinstance(cascade, Cascade)
    return cascade.every_exit(), list(range(len(entry.exits)))
