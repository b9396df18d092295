"""Calibrating exits: one run of the all-exits engine over the data, thresholds from some rows, their worth from others.

What is found goes into ``quality.json``, where each named point becomes a member of the family.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from calib.answering import Read, Work
from calib.data import Examples
from calib.exits_search import Exits, Search, named_rules, outcome, swept_rules
from calib.labels import label_ids
from compexport.errors import InputError, describe
from engines.answers import label_names
from engines.paths import segment_macs
from engines.points import point_name

SEED = 0


@dataclass(frozen=True)
class Split:
    """Which examples thresholds are chosen on, and which they are reported on; ``said`` tells it in words."""

    chosen: Examples
    reported: Examples
    said: str


def split(examples: Examples, calibration: Examples | None) -> Split:
    """Thresholds from ``calibration`` where it is given, else from one half of ``examples``, drawn by a fixed seed.

    Rows (text and pair) that are reported are never chosen on: where a text stands on both sides, it is reported alone.
    Raises InputError when nothing is left to choose on, or there are too few examples for two halves.
    """
    if calibration is not None:
        chosen = _others(calibration, examples)
        if not len(chosen):
            what = (
                "all calibration rows are in the data too, so exit thresholds would be judged on what they were fit to"
            )
            raise InputError(describe(what, expected="other rows, or none: then one half of the data is taken"))
        said = f"{len(chosen)} rows of {calibration.origin or 'other data'}"
        return Split(chosen, examples, said + _dropped(len(calibration) - len(chosen)))
    if len(examples) < 2:
        expected = "at least 2, or calibration data of their own"
        raise InputError(
            describe("too few examples to choose exit thresholds on", got=len(examples), expected=expected)
        )
    order = np.random.default_rng(SEED).permutation(len(examples))
    half = len(examples) // 2
    drawn, reported = examples.take(sorted(order[:half].tolist())), examples.take(sorted(order[half:].tolist()))
    chosen = _others(drawn, reported)
    if not len(chosen):
        what = "the data hold hardly anything but one text, so there is nothing to choose exit thresholds on"
        raise InputError(describe(what, expected="different texts, or calibration data of their own"))
    origin = examples.origin or "the data"
    said = f"{len(chosen)} of {len(examples)} rows of {origin}, drawn at random; the others are reported"
    return Split(chosen, reported, said + _dropped(half - len(chosen)))


def _others(examples: Examples, than: Examples) -> Examples:
    """Those of ``examples`` whose text and pair are not in ``than``; the very same when that is all of them."""
    there = set(than.inputs)
    kept = [index for index, row in enumerate(examples.inputs) if row not in there]
    return examples if len(kept) == len(examples) else examples.take(kept)


def _dropped(count: int) -> str:
    return f"; {count} more are among those reported too, and were not used" if count else ""


def _calibrate(
    variant: str, layers: Sequence[int], chosen: Exits, reported: Exits, backbone_macs: float, search: Search
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The points of ``variant`` and its entry among the exits, both as ``quality.json`` keeps them.

    Rules come from ``chosen``; every figure is of ``reported``. ``backbone_macs``: of the whole backbone, per row.
    """
    count = len(layers)
    points = {}
    for name, rule in named_rules(chosen, search).items():
        found = outcome(reported, rule.checked(count))
        points[point_name(variant, name)] = {
            "variant": variant,
            "rule": rule.document(),
            **found.document(),
            "flops_ratio": backbone_macs / found.expected_macs,
        }
    sweep = []
    for rule in swept_rules(chosen, search):
        found = outcome(reported, rule.checked(count))
        kept = {name: value for name, value in found.document().items() if name != "cut_values"}
        sweep.append({"threshold": rule.thresholds, **kept})
    values = reported.right.mean(axis=0).tolist()
    entry = {"layers": list(layers), "statistic": search.statistic, "values": values, "sweep": sweep}
    return points, entry


def rows_to_choose_on(parts: Split | None, backbone: str, layers: Mapping[str, Sequence[int]]) -> int:
    """How many answers ``points_and_exits`` needs, for progress."""
    if parts is None:
        return 0
    asked = parts.chosen.labels is None and backbone not in layers
    return (len(layers) + asked) * len(parts.chosen)


def points_and_exits(
    work: Work, backbone: str, reported: Mapping[str, Read], parts: Split, truth: Sequence[str], search: Search
) -> dict[str, dict[str, Any]]:
    """``points`` and ``exits`` of the quality table. ``truth``: the backbone's labels of the reported rows."""
    manifest, layers = work.runtime.bundle.manifest, work.runtime.members.layers
    classes = next(iter(reported.values())).exits.logits.shape[-1]
    labels = label_names(manifest.labels, classes)
    chosen = {name: work.read(name, parts.chosen, search.statistic) for name in reported}
    if parts.chosen.labels is not None:
        chosen_truth: Sequence[str] = []
    elif backbone in chosen:
        chosen_truth = chosen[backbone].labels
    else:
        chosen_truth = [answer["label"] for answer in work.answers(backbone, parts.chosen)]
    points: dict[str, Any] = {}
    entries = {}
    right = _truth_ids(parts.reported, truth, labels)
    chosen_right = _truth_ids(parts.chosen, chosen_truth, labels)
    for name, read in reported.items():
        macs = float(np.mean([sum(segment_macs(manifest, backbone, length)) for length in read.tokens]))
        found, entries[name] = _calibrate(
            name,
            layers[name],
            replace(chosen[name].exits, truth=chosen_right),
            replace(read.exits, truth=right),
            macs,
            search,
        )
        points |= found
    return {"points": points, "exits": entries}


def _truth_ids(examples: Examples, backbones: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.int64]:
    """[N] the right class of each example: its label, or what the backbone says."""
    if examples.labels is None:
        return np.array([names.index(label) for label in backbones])
    return np.array(label_ids(examples.labels, names, examples.origin, examples.label_names))
