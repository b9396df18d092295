"""Answering within a budget: which variant would, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.api.bundles import open_runtime
from compexport.api.options import DEVICE, Device
from compexport.errors import InputError, describe

if TYPE_CHECKING:
    from engines.exit_rule import ExitRule
    from engines.text import Text


def select(
    bundle: str | Path = "bundle",
    *,
    budget_ms: float | None,
    batch: int = 1,
    length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    device: Device = DEVICE,
) -> dict[str, Any]:
    """Which variant would answer ``batch`` sequences of ``length`` tokens, and why each other one lost.

    ``settings``: how texts are written, in a bundle that writes some, by the names of ``engines.options.NAMES``.
    """
    with open_runtime(bundle, device) as runtime:
        return runtime.select(batch=batch, length=length, budget_ms=budget_ms, settings=settings).document()


def run(
    bundle: str | Path,
    texts: Sequence[Text],
    *,
    budget_ms: float | None = None,
    ratio: float | None = None,
    variant: str | None = None,
    rule: ExitRule | None = None,
    settings: Mapping[str, Any] | None = None,
    truncate: bool = True,
    show: Callable[[str], None] | None = None,
    device: Device = DEVICE,
) -> dict[str, Any]:
    """Answer ``texts`` together; arguments and errors as ``Runtime.run_batch``.

    ``show`` is told a text that is written, piece by piece as it comes: then there may be one only, and no ``rule``.
    """
    if not texts:
        raise InputError(describe("nothing to run", expected='--text "..."'))
    asked: dict[str, Any] = {"budget_ms": budget_ms, "ratio": ratio, "variant": variant, "settings": settings}
    if show is not None and (len(texts) > 1 or rule is not None):
        got = f"{len(texts)} texts" if rule is None else "exit thresholds"
        raise InputError(describe("a text that is shown as it comes", got=got, expected="one text to be written"))
    with open_runtime(bundle, device) as runtime:
        if show is None:
            return runtime.run_batch(texts, rule=rule, truncate=truncate, **asked).document()
        stream = runtime.stream(texts[0], truncate=truncate, **asked)
        for piece in stream:
            show(piece)
        assert stream.batch is not None
        return stream.batch.document()


def exit_rule(thresholds: Sequence[float] | None, statistic: str | None, mode: str | None) -> ExitRule | None:
    """The rule that thresholds, one or one for each exit but the last, make; None without any."""
    from engines.exit_rule import ENTROPY, PER_ROW, ExitRule, thresholds_of

    if thresholds is None:
        for option, given in (("--statistic", statistic), ("--exit-mode", mode)):
            if given is not None:
                raise InputError(describe(f"{option} without a threshold", got=given, expected="--threshold too"))
        return None
    return ExitRule(thresholds_of(thresholds), statistic or ENTROPY, mode or PER_ROW)


def paired(texts: Sequence[str], seconds: Sequence[str] | None) -> list[Text]:
    """Texts, or pairs when there is a second text for every one of them."""
    if not seconds:
        return list(texts)
    if len(seconds) != len(texts):
        expected = f"{len(texts)}, one for every --text"
        raise InputError(describe("--text-pair does not match", got=f"{len(seconds)} of them", expected=expected))
    return list(zip(texts, seconds, strict=True))
