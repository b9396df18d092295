"""What a manifest may say of exits, and that it says nothing of them where there are none."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from engines.manifest import Manifest, Variant

GRAPHS = {"segment-0": "a", "segment-1": "b", "all-exits": "c"}


def variant(**changes: Any) -> Variant:
    facts: dict[str, Any] = {
        "method": "costeff",
        "ratio": 2.5,
        "precision": "fp32",
        "graphs": GRAPHS,
        "params": 10,
        "extra_params": 10,
        "flops_ratio": 2.4,
        "exits": [2, 4],
    }
    return Variant(**{**facts, **changes})


def manifest(name: str = "v", task: str = "sequence-classification", **changes: Any) -> Manifest:
    names = ("name", "architecture", "model_type", "sha256")
    sizes = {"params": 10, "hidden_size": 4, "layers": 4}
    return Manifest(
        backbone={**dict.fromkeys(names, "x"), **sizes},  # type: ignore[arg-type]
        method="costeff",
        task=task,  # type: ignore[arg-type]
        variants={name: variant(**changes)},
        graphs={},
        files={},
        versions={},
        command="",
    )


def test_exits_are_written_where_there_are_some() -> None:
    assert variant().model_dump()["exits"] == [2, 4]
    without = variant(exits=None, graphs={"encoder": "a"})
    assert "exits" not in without.model_dump() and "exits" not in without.model_dump(mode="json")
    assert Variant.model_validate(without.model_dump()) == without
    assert Variant.model_validate(variant().model_dump()) == variant()
    assert manifest().variants["v"].exits == [2, 4]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"exits": None}, "one segment for each of exits"),
        ({"exits": [4]}, "one segment for each of exits"),
        ({"exits": [1, 2, 4]}, "one segment for each of exits"),
        ({"exits": [], "graphs": {"all-exits": "c"}}, "exits: layers from 1 on"),
        ({"exits": [4, 2]}, "exits: layers from 1 on"),
        ({"exits": [2, 2]}, "exits: layers from 1 on"),
        ({"exits": [0, 4]}, "exits: layers from 1 on"),
        ({"graphs": {"segment-0": "a", "segment-1": "b"}}, "has the role all-exits"),
        ({"graphs": {**GRAPHS, "prefix-3": "d"}}, r"with exits \[2, 4\] has no role prefix-3"),
        ({"graphs": {**GRAPHS, "encoder": "d"}}, r"with exits \[2, 4\] has no role encoder"),
        ({"exits": None, "graphs": {"all-exits": "a"}}, "without exits has the role encoder alone"),
        ({"exits": None, "graphs": {}}, "without exits has the role encoder alone"),
        ({"task": "question-answering"}, "v: exits belong to the task sequence-classification"),
        ({"exits": [2, 3]}, r"the last of exits \[2, 3\] is not the last layer"),
        ({"exits": [2, 5]}, r"the last of exits \[2, 5\] is not the last layer"),
    ],
)
def test_wrong_exits(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        manifest(**changes)


def test_prefixes_end_at_exits() -> None:
    assert manifest(graphs={**GRAPHS, "prefix-2": "d", "prefix-4": "e"}).variants["v"].exits == [2, 4]


@pytest.mark.parametrize("name", ["", "v@2x", "v/segment-0", ".v", "v\n", "v w", "v" * 101])
def test_names_that_would_be_taken_for_something_else(name: str) -> None:
    with pytest.raises(ValidationError, match="a variant's name has at most 100 of"):
        manifest(name)
