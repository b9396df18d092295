"""Families that write, and those that run one layer again and again, as real TensorRT-RTX plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.compexport.rtx_families import MARKS, Built, require_equal_bytes, require_plans

pytestmark = MARKS
BUILDS = [
    ("tilings", "fp32"),  # of a T5
    ("modular-t5", "fp16"),
    ("modular-t5", "bf16"),
    ("modular-bart", "fp16"),
    *((family, precision) for family in ("ode", "decoder") for precision in ("fp32", "fp16")),
    ("ode", "bf16"),
]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny: Callable[..., Path]) -> Built:
    return Built(tmp_path_factory.mktemp("rtx"), tiny)


@pytest.mark.parametrize(("family", "precision"), BUILDS)
def test_every_graph_becomes_a_plan(bundles: Built, family: str, precision: str) -> None:
    records = require_plans(bundles(family, precision), precision)
    assert {len(record.profiles) for record in records} == {3 if family == "decoder" else 1}
    if family.startswith("modular"):
        assert len(records) == 6  # encoder, first step, cached step, of the model and of its half
    if family == "tilings":
        assert len(records) == 9


@pytest.mark.parametrize(
    ("family", "precision", "graph"),
    [("ode", "fp32", "ode-r2"), ("decoder", "fp16", "ode-r2"), ("modular-t5", "fp16", "modular-d1x4-past")],
)
def test_a_second_build_gives_the_same_bytes(
    bundles: Built, tmp_path: Path, family: str, precision: str, graph: str
) -> None:
    require_equal_bytes(bundles(family, precision), graph, tmp_path)
