"""A tiny family with exits from a PyTorch model to answers: what is true of cascades holds of its real engines."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from calib.data import Examples
from calib.quality import evaluate
from engines.bundle import Bundle
from engines.cascade import Cascade
from engines.exit_rule import ExitRule
from engines.points import points_of
from engines.runtime import Runtime
from exporter import family
from exporter.backbone import load_backbone
from exporter.checkpoint import save_checkpoint
from exporter.methods.costeff import CosteffModel
from exporter.methods.costeff_checkpoint import stored_tensors
from exporter.methods.slender import SlenderShape
from tests import models

EXITS = {1: (1, 2, 4), 2.5: (2, 3, 4)}
NAMES = {ratio: f"costeff-r{ratio}-fp32" for ratio in EXITS}
WORDS = sorted({word for text in models.TEXTS for word in text.split()})


def texts(count: int, seed: int = 0) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 30))) for _ in range(count)]


def unlike(model: CosteffModel, seed: int) -> CosteffModel:
    """With exits that differ from each other and are more or less sure of themselves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".highway." in name or name.startswith("classifier"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return model


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Bundle:
    backbone = load_backbone(tiny("tiny-bert-deep", "sequence-classification"))
    slender = SlenderShape((1, 3, 2, 4), (9, 64, 1, 20), 10)
    made = {
        1.0: CosteffModel.from_backbone(backbone),
        2.5: unlike(CosteffModel.from_backbone(backbone, slender), 1),
    }
    folder = tmp_path_factory.mktemp("costeff")
    save_checkpoint(
        folder / "checkpoint",
        backbone.folder,
        "costeff",
        {"shapes": {f"{ratio:g}": model.shape.document() for ratio, model in made.items()}},
        {ratio: stored_tensors(model, backbone) for ratio, model in made.items()},
    )
    family.build(folder / "checkpoint", [2.5], folder / "bundle", exits=EXITS)
    return Bundle.open(folder / "bundle")


@pytest.fixture(scope="module")
def runtime(bundle: Bundle) -> Runtime:
    return Runtime(bundle, threads=1)


def exits(runtime: Runtime, ratio: float, given: list[str], threshold: float, **rule: Any) -> list[tuple[int, str]]:
    outputs = runtime.run_batch(given, ratio=ratio, rule=ExitRule(threshold, **rule)).outputs
    return [(output["exit"], output["label"]) for output in outputs]


@pytest.mark.parametrize("ratio", EXITS)
def test_the_ends_of_the_scale(runtime: Runtime, ratio: float) -> None:
    """Properties 1 and 2 of the method: -1 goes to the last exit, above ln C all leave at the first."""
    given = texts(20)
    assert {layer for layer, _ in exits(runtime, ratio, given, -1)} == {4}
    assert {layer for layer, _ in exits(runtime, ratio, given, math.log(2) + 1e-3)} == {EXITS[ratio][0]}


@pytest.mark.parametrize("ratio", EXITS)
def test_higher_thresholds_never_leave_later(runtime: Runtime, ratio: float) -> None:
    """Property 3."""
    given = texts(40, seed=1)
    found = [[layer for layer, _ in exits(runtime, ratio, given, t)] for t in np.linspace(0, 0.7, 15).tolist()]
    assert any(len(set(one)) > 1 for one in found), "no threshold parts the rows, so nothing was tested"
    for lower, higher in pairwise(found):
        assert all(b <= a for a, b in zip(lower, higher, strict=True))


@pytest.mark.parametrize("threshold", [0.3, 0.6, 0.68])
@pytest.mark.parametrize("ratio", EXITS)
def test_batches_answer_as_rows_alone(runtime: Runtime, ratio: float, threshold: float) -> None:
    """Property 5: label and exit of every row, in batches of 32 and of 1."""
    given = texts(64, seed=2)
    alone = [one for text in given for one in exits(runtime, ratio, [text], threshold)]
    assert exits(runtime, ratio, given, threshold) == alone


def test_batch_maximum_is_what_the_official_code_does(runtime: Runtime) -> None:
    """At batch 1 the two modes are one; in a batch all leave where the least sure row may."""
    given = texts(8, seed=3)
    rows = [layer for layer, _ in exits(runtime, 2.5, given, 0.68)]
    assert [exits(runtime, 2.5, [text], 0.68, mode="batch-maximum")[0][0] for text in given] == rows
    together = {layer for layer, _ in exits(runtime, 2.5, given, 0.68, mode="batch-maximum")}
    assert len(together) == 1 and together.pop() >= max(rows)


def test_evaluated_points_are_run_as_promised(runtime: Runtime, bundle: Bundle) -> None:
    given = texts(80, seed=4)
    random = np.random.default_rng(0)
    calibration = Examples(texts(80, seed=5), labels=random.choice(["negative", "positive"], 80).tolist())
    examples = Examples(given, labels=random.choice(["negative", "positive"], 80).tolist())
    table = evaluate(runtime, examples, calibration=calibration).table
    points = points_of(table, dict.fromkeys(NAMES.values(), 3))
    assert points
    bundle.save_quality(table)
    fresh = Runtime(bundle, threads=1)
    for name, point in points.items():
        outputs = fresh.run_batch(given, variant=name).outputs
        left = [output["exit"] for output in outputs]
        layers = EXITS[2.5 if point.variant == NAMES[2.5] else 1]
        assert [left.count(layer) / 80 for layer in layers] == pytest.approx(list(point.histogram))
    assert isinstance(fresh.session(NAMES[2.5]), Cascade)
