"""What a request gives back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engines.answers import Answer
from engines.selector import Decision


@dataclass(frozen=True, slots=True)
class Result:
    """The answer to one text. ``output`` is the task's answer as ``run --json`` prints it.

    ``label`` and ``scores`` are None for tasks that do not classify whole texts. ``predicted_ms`` is the engine's
    corrected p99 for the whole request, ``latency_ms`` what the whole request took (tokenising and waiting included),
    ``met_budget`` whether that kept the budget. ``truncated``: the text was longer than the model reads. ``exit``: the
    layer (of a variant with steps, the step) after which a variant with exits answered, and ``why`` there, as in
    ``engines.cascade.ExitRun``; of a text that was written on, ``why`` it ends.
    """

    label: str | None
    scores: dict[str, float] | None
    variant: str
    predicted_ms: float | None
    latency_ms: float
    met_budget: bool
    truncated: bool
    output: Answer

    @property
    def exit(self) -> int | None:
        layer: int | None = self.output.get("exit")
        return layer

    @property
    def why(self) -> str | None:
        reason: str | None = self.output.get("why")
        return reason


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
        tokens = self.decision.expected_tokens
        return {
            "variant": self.variant,
            "predicted_ms": self.predicted_ms,
            "usual_ms": self.decision.usual_ms,
            "latency_ms": self.latency_ms,
            "met_budget": self.met_budget,
            "outputs": self.outputs,
            "truncated": self.truncated,
            "reason": self.decision.reason,
            **({} if tokens is None else {"expected_tokens": tokens.document()}),
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
