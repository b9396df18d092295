"""The form and the step sizes of a ratio, chosen by how far the final states stray from the whole model's.

Nothing is trained and no label is needed. Besides equal steps there are candidates that are smaller where the model
bends more, by its own residuals, and ramps. Letters: N iterations, n steps, R(h) = F(h) - h the residual of an
iteration.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor

from calib.batches import Batch, batches_by_length, collate_for, tokenise
from calib.data import Examples
from calib.progress import Progress, silent
from compexport.errors import InputError, describe
from exporter.backbone import Backbone
from exporter.methods.ode import FORMS, Form, SteppedEncoder, Stepping, stepping_for_ratio

ROWS = 128  # texts, at most, that are looked at, and as many of their tokens
_BATCH = 32
_RAMPS = (0.25, 0.5, 2.0, 4.0)  # the last step's size over the first one's
# A list must be better than equal steps by this share of their error: less is the texts' chance.
_WORTH = 0.02

Value = TypeVar("Value")
Lists = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Tried:
    """One candidate and its relative error: the distance of final states from the whole model's over their size."""

    name: str
    stepping: Stepping
    error: float

    def document(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "form": self.stepping.form,
            "steps": self.stepping.lists(),
            "error": self.error if math.isfinite(self.error) else None,
        }


@dataclass(frozen=True)
class Choice:
    """The chosen steps, and everything that was tried, the smallest error first."""

    stepping: Stepping
    tried: tuple[Tried, ...]

    def document(self) -> dict[str, Any]:
        """For a record."""
        return {
            "form": self.stepping.form,
            "steps": self.stepping.lists(),
            "tried": [one.document() for one in self.tried],
        }


def stepping_on(
    backbone: Backbone,
    examples: Examples,
    ratio: float,
    forms: Sequence[Form] = FORMS,
    *,
    progress: Progress = silent,
) -> Choice:
    """The steps of ``ratio`` that suit ``examples`` best: at most ``ROWS`` of them, cut at as many tokens.

    Raises InputError for a ratio that leaves no whole number of steps, and for a model that shares nothing.
    """
    rows = tokenise(backbone, examples.sample(ROWS, seed=0), min(ROWS, backbone.max_length))
    batches = batches_by_length(rows, _BATCH, collate_for(backbone))
    return choose_stepping(SteppedEncoder(backbone.model), batches, ratio, forms, progress=progress)


@torch.no_grad()
def choose_stepping(
    encoder: SteppedEncoder,
    batches: Iterable[Batch],
    ratio: float,
    forms: Sequence[Form] = FORMS,
    candidates: Mapping[str, Lists] | None = None,
    *,
    progress: Progress = silent,
) -> Choice:
    """The candidate whose final states are nearest those of steps of 1, over all real tokens of ``batches``.

    ``batches`` hold input_ids, attention_mask[, token_type_ids] [B,S]. ``candidates``: lists of steps by name, each
    tried in all ``forms``; by default those of :func:`candidate_lists`. Equal steps are always tried, and win unless a
    list is better by more than chance. The encoder should be in eval mode; the same inputs give the same choice.
    """
    batches = list(batches)
    groups = encoder.facts.groups
    even = stepping_for_ratio(groups, ratio).steps
    whole, bends = _whole_model(encoder, batches)
    if not all(bool(states.isfinite().all()) for states in whole):
        hint = "its weights may be damaged"
        raise InputError(
            describe("states of the model in steps of 1", got="NaN or infinite", expected="numbers", hint=hint)
        )
    if candidates is None:
        candidates = candidate_lists(groups, [len(sizes) for sizes in even], bends)
    lists = {"even": even, **{name: steps for name, steps in candidates.items() if steps != even}}
    tried: list[Tried] = []
    for name, steps in lists.items():
        for form in forms:
            progress(f"trying steps of ratio {ratio:g}", len(tried), len(lists) * len(forms))
            stepping = Stepping(form, steps).require_fit(groups, name)
            tried.append(Tried(name, stepping, _error(encoder, batches, whole, stepping)))
    return Choice(_best(tried), tuple(sorted(tried, key=lambda one: one.error)))


def _best(tried: Sequence[Tried]) -> Stepping:
    simple = min((one for one in tried if one.name == "even"), key=lambda one: one.error)
    best = min(tried, key=lambda one: one.error)
    return best.stepping if best.error < simple.error * (1 - _WORTH) else simple.stepping


# --- candidates ------------------------------------------------------------------------------------------------------


def candidate_lists(groups: Sequence[int], counts: Sequence[int], bends: Sequence[float]) -> dict[str, Lists]:
    """Lists of ``counts`` steps per group that go as far as its ``groups`` iterations, besides equal ones.

    ``bends``: for each of the N iterations, how much the residual changes over it. Euler's error in a step of size dt
    there is about dt² times that, so "bend" gives every step the same share of its square root; ramps need no
    measurement. A group of one step has no choice.
    """
    density = [math.sqrt(one) for one in bends]
    made: dict[str, Lists] = {
        "bend": tuple(equalised(share, n) for share, n in zip(_by_group(density, groups), counts, strict=True))
    }
    for slope in _RAMPS:
        steps = tuple(ramp(total, n, slope) for total, n in zip(groups, counts, strict=True))
        made[f"ramp {slope:g}"] = steps
    return made


def _by_group(values: Sequence[Value], groups: Sequence[int]) -> list[Sequence[Value]]:
    ends = [sum(groups[:number]) for number in range(len(groups) + 1)]
    return [values[start:end] for start, end in pairwise(ends)]


def ramp(total: float, n: int, slope: float) -> tuple[float, ...]:
    """``n`` steps, ``total`` together, each over the one before the same, and the last over the first ``slope``."""
    sizes = [slope ** (index / max(1, n - 1)) for index in range(n)]
    return _summing([total * size / math.fsum(sizes) for size in sizes], total)


def equalised(density: Sequence[float], n: int) -> tuple[float, ...]:
    """``n`` steps over intervals of length 1 with these densities, so that each covers the same mass.

    Every interval counts at least a twentieth of the mean, so that no step swallows all that looked straight.
    """
    mean = math.fsum(density) / len(density)
    if not (math.isfinite(mean) and mean > 0):
        return (len(density) / n,) * n
    masses = [max(one, mean / 20) for one in density]
    wanted = [math.fsum(masses) * number / n for number in range(1, n)]
    ends = [0.0, *_places(masses, wanted), float(len(density))]
    return _summing([after - before for before, after in pairwise(ends)], len(density))


def _places(masses: Sequence[float], wanted: Iterable[float]) -> Iterator[float]:
    """Where the mass from the start on reaches each ``wanted``, which rise."""
    index, before = 0, 0.0
    for mass in wanted:
        while index < len(masses) - 1 and before + masses[index] < mass:
            before += masses[index]
            index += 1
        yield index + min(1.0, (mass - before) / masses[index])


def _summing(sizes: Sequence[float], total: float) -> tuple[float, ...]:
    """``sizes`` to three decimals, so that people can read and write them; the last makes up for the rest."""
    first = [round(size, 3) for size in sizes[:-1]]
    return (*first, round(total - math.fsum(first), 3))


# --- measuring -------------------------------------------------------------------------------------------------------


def _whole_model(encoder: SteppedEncoder, batches: Sequence[Batch]) -> tuple[list[Tensor], list[float]]:
    """The final states of each batch, and for each iteration how much the residual changes until the next, relatively.

    The last iteration of a group has no next one, and takes the change before it.
    """
    groups = encoder.facts.groups
    final, squares, size = [], [0.0] * sum(groups), 0.0
    for batch in batches:
        found, mask = encoder(**_inputs(batch), keep_states=True), batch["attention_mask"]
        final.append(found.last_hidden_state)
        size += _square(found.hidden_states[-1], mask)
        residuals = [after - before for before, after in pairwise(found.hidden_states)]
        for index, (before, after) in enumerate(pairwise(residuals)):
            squares[index] += _square(after - before, mask)
    bends: list[float] = []
    for share in _by_group(squares, groups):
        changes = [math.sqrt(one / max(size, 1e-30)) for one in share[:-1]]
        bends += [*changes, changes[-1] if changes else 1.0]
    return final, bends


def _error(encoder: SteppedEncoder, batches: Sequence[Batch], whole: Sequence[Tensor], stepping: Stepping) -> float:
    """Relative distance of final states; infinite where they are no numbers."""
    far = size = 0.0
    for batch, expected in zip(batches, whole, strict=True):
        got = encoder(**_inputs(batch), stepping=stepping).last_hidden_state
        far += _square(got - expected, batch["attention_mask"])
        size += _square(expected, batch["attention_mask"])
    return math.sqrt(far / size) if math.isfinite(far) and size > 0 else math.inf


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


def _square(states: Tensor, mask: Tensor) -> float:
    """The sum of squares over the real tokens: states [B,S,H], mask [B,S]."""
    return float(states[mask.bool()].double().square().sum())
