"""How long work reports itself."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """How long work reports itself: the stage, and how far it is when that is known."""

    def __call__(self, message: str, done: float | None = None, total: float | None = None) -> None: ...


def silent(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""
