"""Comparing a graph with its reference: two callables, the same feeds, one report; a mismatch is an error.

numpy only, so that calibration and tests can use it without a framework.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from compexport.errors import ParityError, describe
from engines.manifest import EXIT_OUTPUTS, Parity, Rounding

Arrays = dict[str, npt.NDArray[Any]]

LOGITS = "logits"
# The mask of the text that is read, whose shape stands for a feed's: of an encoder's own text, of a decoder's source.
MASKS = ("attention_mask", "encoder_attention_mask")
# Largest absolute difference between a graph and eager fp32 PyTorch.
TOLERANCE = {"fp32": 1e-4}


@dataclass(frozen=True)
class Tolerance:
    """How far a precision may take an output from fp32, relative to its largest magnitude; the share of choices kept.

    ``epsilon`` is the distance of 1 from the next number. Logits of a row that differ by less than ``TIE`` times that,
    relative to the row's largest, are equal as far as the precision can tell. By as much may a graph whose types are
    widened to fp32 differ: its constants are rounded too, such as the scale of attention scores, and whatever can be
    computed from weights alone (what a decoder reads before a text) is computed in half while tracing.
    """

    relative: float
    same_choice: float
    epsilon: float


TIE = 4
# fp16 as methods.md wants it. bf16 has three bits less, and so eight times the error.
ROUNDING = {"fp16": Tolerance(2e-2, 0.99, 2.0**-10), "bf16": Tolerance(8 * 2e-2, 0.99, 2.0**-7)}
# Outputs with a scale of their own: probabilities, and nats.
STATISTICS = tuple(name for name in EXIT_OUTPUTS if name != LOGITS)


def compare(
    name: str,
    reference: Callable[[Arrays], Sequence[npt.NDArray[Any]]],
    candidate: Callable[[Arrays], Sequence[npt.NDArray[Any]]],
    feeds: Iterable[Arrays],
    tolerance: float,
    exact: Callable[[Arrays], Sequence[npt.NDArray[Any]]] | None = None,
) -> Parity:
    """Run both on every feed and compare all outputs; ParityError on the first that differs by more than allowed.

    A NaN, an infinity or another shape is a mismatch whatever the tolerance. Where the two differ by more than the
    tolerance, ``exact``, the reference in float64, says whether it is the candidate that is off. The references come
    first, all of them: two frameworks in turn would wait for each other's spinning threads. Every feed has one of
    ``MASKS``, whose shape is reported.
    """
    feeds = list(feeds)
    expected = [reference(feed) for feed in feeds]
    worst = 0.0
    shapes = []
    for feed, outputs in zip(feeds, expected, strict=True):
        batch, length = next(feed[name] for name in MASKS if name in feed).shape
        where = f"{name} at batch {batch}, length {length}"
        found = list(candidate(feed))
        differences = _differences(where, outputs, found)
        if exact is not None and not max(differences) <= tolerance:
            differences = _differences(where, exact(feed), found)
        worst = max(worst, _within(where, max(differences), tolerance))
        shapes.append((batch, length))
    return Parity(max_abs=worst, tolerance=tolerance, shapes=shapes)


def _differences(where: str, expected: Sequence[npt.NDArray[Any]], got: Sequence[npt.NDArray[Any]]) -> list[float]:
    """The largest absolute difference of each output; infinite where either is no number."""
    if len(expected) != len(got):
        raise ParityError(describe(f"{where}: number of outputs", got=len(got), expected=len(expected)))
    found = []
    for wanted, given in zip(expected, got, strict=True):
        if wanted.shape != given.shape:
            raise ParityError(describe(f"{where}: output shape", got=given.shape, expected=wanted.shape))
        if not (np.isfinite(wanted).all() and np.isfinite(given).all()):
            found.append(float("inf"))
        else:
            found.append(float(np.max(np.abs(wanted.astype(np.float64) - given), initial=0.0)))
    return found


def _within(where: str, distance: float, tolerance: float) -> float:
    if distance <= tolerance:
        return distance
    raise ParityError(
        describe(
            f"{where}: the graph differs from PyTorch",
            got=f"max abs {distance:.3g}" if distance < float("inf") else "a value that is not finite",
            expected=f"<= {tolerance:g}",
            hint="nothing was written; please report the model's config",
        )
    )


def compare_rounding(
    name: str,
    outputs: Sequence[str],
    expected: Sequence[Sequence[npt.NDArray[Any]]],
    found: Sequence[Sequence[npt.NDArray[Any]]],
    tolerance: Tolerance,
) -> Rounding:
    """Compare what a precision gives with what fp32 gave for the same feeds, ``outputs`` by name, feed by feed.

    An output differs by its largest difference over all feeds, divided by its largest magnitude in fp32; probabilities
    and entropies are not divided. ParityError where that, or the share of rows of logits whose largest is elsewhere, is
    more than allowed, and for shapes and numbers that are none.
    """
    where = f"{name} in the precision it is built for"
    worst, rows, same = 0.0, 0, 0
    differences = [_differences(where, wanted, given) for wanted, given in zip(expected, found, strict=True)]
    for index, output in enumerate(outputs):
        largest = max(float(np.max(np.abs(wanted[index]), initial=0.0)) for wanted in expected)
        scale = 1.0 if output in STATISTICS or not largest else largest
        distance = max(of_feed[index] for of_feed in differences) / scale
        if not distance <= tolerance.relative:
            raise _too_far(f"{where}: {output} differs from fp32", distance, tolerance.relative)
        worst = max(worst, distance)
        if output.endswith(LOGITS):
            for wanted, given in zip(expected, found, strict=True):
                counted, agreeing = _choices(wanted[index], given[index], TIE * tolerance.epsilon)
                rows, same = rows + counted, same + agreeing
    share = same / rows if rows else None
    if share is not None and share < tolerance.same_choice:
        got, least = f"in {share:.1%} of {rows} rows", f"at least {tolerance.same_choice:.0%}"
        raise ParityError(describe(f"{where}: chooses as fp32", got=got, expected=least, hint=_HALF_HINT))
    return Rounding(
        max_relative=worst,
        tolerance=tolerance.relative,
        same_choice=share,
        least_same_choice=tolerance.same_choice,
    )


def _choices(wanted: npt.NDArray[Any], given: npt.NDArray[Any], tie: float) -> tuple[int, int]:
    """Rows of logits [..., C] whose largest stands out, and how many of them have it at the same place."""
    rows, others = (logits.reshape(-1, logits.shape[-1]).astype(np.float64) for logits in (wanted, given))
    if rows.shape[-1] < 2:
        return 0, 0
    second, first = np.partition(rows, -2)[:, -2:].T
    clear = first - second > tie * np.abs(rows).max(axis=-1)
    agreeing = rows.argmax(axis=-1) == others.argmax(axis=-1)
    return int(clear.sum()), int((clear & agreeing).sum())


_HALF_HINT = "nothing was written; build it with --precision fp32"


def _too_far(what: str, distance: float, tolerance: float) -> ParityError:
    got = f"{distance:.3g} of its largest" if distance < float("inf") else "a value that is not finite"
    return ParityError(describe(what, got=got, expected=f"<= {tolerance:g}", hint=_HALF_HINT))


def probe_feeds(
    names: Sequence[str], ratio: int, vocabulary: int, max_length: int, type_vocabulary: int = 1, pad_id: int = 0
) -> list[Arrays]:
    """Random valid inputs: batches 1 and 3, lengths around one and three groups, and 128; batch 3 is padded.

    Every array is int64 [B,S]. Padded positions hold ``pad_id`` with mask 0, on the right.
    """
    generator = np.random.default_rng(0)
    lengths = sorted({min(max_length, n) for n in (1, ratio - 1, ratio, ratio + 1, 3 * ratio + 1, 128) if n >= 1})
    return [
        _probe(generator, names, batch, length, vocabulary, type_vocabulary, pad_id)
        for length in lengths
        for batch in (1, 3)
    ]


def _probe(
    generator: np.random.Generator,
    names: Sequence[str],
    batch: int,
    length: int,
    vocabulary: int,
    type_vocabulary: int,
    pad_id: int,
) -> Arrays:
    real = np.full(batch, length) if batch == 1 else generator.integers(1, length + 1, batch)
    real[0] = length
    mask = (np.arange(length) < real[:, None]).astype(np.int64)
    ids = generator.integers(0, vocabulary, (batch, length))
    ids[ids == pad_id] = (pad_id + 1) % vocabulary  # RoBERTa takes positions from which ids are pad
    made = {
        "input_ids": np.where(mask == 1, ids, pad_id),
        "attention_mask": mask,
        "token_type_ids": generator.integers(0, type_vocabulary, (batch, length)) * mask,
    }
    return {name: made[name] for name in names}
