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
from engines.cascade import whole_path
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

    Raises InputError when there are too few examples for two halves.
    """
    if calibration is not None:
        if calibration.sha256() == examples.sha256():
            what = (
                "calibration data are the data themselves, so exit thresholds would be judged on what they were fit to"
            )
            raise InputError(describe(what, expected="other rows, or none: then one half of the data is taken"))
        return Split(calibration, examples, f"{len(calibration)} rows of {calibration.origin or 'other data'}")
    if len(examples) < 2:
        expected = "at least 2, or calibration data of their own"
        raise InputError(
            describe("too few examples to choose exit thresholds on", got=len(examples), expected=expected)
        )
    order = np.random.default_rng(SEED).permutation(len(examples))
    half = len(examples) // 2
    chosen, reported = examples.take(sorted(order[:half].tolist())), examples.take(sorted(order[half:].tolist()))
    said = (
        f"{half} of {len(examples)} rows of {examples.origin or 'the data'}, drawn at random; the others are reported"
    )
    return Split(chosen, reported, said)


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
    labels = manifest.labels or _unnamed(reported)
    chosen = {name: work.read(name, parts.chosen, search.statistic) for name in reported}
    if parts.chosen.labels is not None:
        chosen_truth: Sequence[str] = []
    elif backbone in chosen:
        chosen_truth = chosen[backbone].labels
    else:
        chosen_truth = [answer["label"] for answer in work.answers(backbone, parts.chosen)]
    points: dict[str, Any] = {}
    entries = {}
    costs = [manifest.graphs[graph].cost for graph in whole_path(manifest.variants[backbone])]
    for name, read in reported.items():
        right = _truth_ids(parts.reported, truth, labels)
        chosen_right = _truth_ids(parts.chosen, chosen_truth, labels)
        macs = float(np.mean([sum(cost.macs(length) for cost in costs) for length in read.tokens]))
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


def _unnamed(reported: Mapping[str, Read]) -> list[str]:
    """What classes are called that the manifest has no names for, as in ``engines.answers``."""
    classes = next(iter(reported.values())).exits.logits.shape[-1]
    return [f"LABEL_{index}" for index in range(classes)]
