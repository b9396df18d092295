"""What a manifest may say of exits, steps and generation, and that it says nothing of them where there are none."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from engines.manifest import (
    Cost,
    Generation,
    Manifest,
    Variant,
    backbones,
    cache_name,
    head_role,
    step_role,
    tile_cache_name,
)

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


def manifest(
    name: str = "v", task: str = "sequence-classification", generation: Generation | None = None, **changes: Any
) -> Manifest:
    names = ("name", "architecture", "model_type", "sha256")
    sizes = {"params": 10, "hidden_size": 4, "layers": 4}
    return Manifest(
        backbone={**dict.fromkeys(names, "x"), **sizes},  # type: ignore[arg-type]
        method="costeff",
        task=task,  # type: ignore[arg-type]
        generation=generation,
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
        ({"exits": None, "graphs": {"all-exits": "a"}}, "without exits has the role encoder or decoder alone, or both"),
        ({"exits": None, "graphs": {}}, "without exits has the role encoder or decoder alone, or both"),
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


# --- steps and generation -------------------------------------------------------------------------------------------

STEPPER = {"embed": "a", "step": "b", "head": "c"}
TWO_GROUPS = {"embed": "a", "step-0": "b", "step-1": "c", "head": "d"}
GENERATION = Generation(eos_ids=[7], bos_id=None, pad_id=0, max_positions=64)


def test_steps_are_written_where_there_are_some() -> None:
    assert "steps" not in variant().model_dump()
    stepped = variant(exits=None, graphs={"encoder": "a"}, steps=[[2, 1.5], [0.5]])
    assert stepped.model_dump()["steps"] == [[2, 1.5], [0.5]]
    assert stepped.step_count == 3 and not stepped.is_stepper
    assert "generation" not in manifest().model_dump()


def test_a_step_engine_has_a_graph_for_each_group() -> None:
    assert variant(exits=None, graphs=STEPPER, steps=[[2, 2]]).is_stepper
    assert variant(exits=None, graphs=TWO_GROUPS, steps=[[2], [2]]).is_stepper
    with_exits = {**STEPPER, head_role(1): "d", head_role(2): "e"}
    assert manifest(exits=[1, 2], graphs=with_exits, steps=[[2, 2]]).variants["v"].exits == [1, 2]
    assert [step_role(0, 1), step_role(1, 2)] == ["step", "step-1"]


def test_a_decoder_generates() -> None:
    facts: dict[str, Any] = {"exits": None, "graphs": {"decoder": "a"}, "steps": [[2, 2]]}
    found = manifest(task="text-generation", generation=GENERATION, **facts)
    assert found.model_dump()["generation"]["eos_ids"] == [7]
    assert cache_name("present", 1, "key") == "present.1.key"


def test_the_backbones_begin_with_the_one_that_is_no_step_engine() -> None:
    stepper = variant(ratio=1, exits=None, graphs=STEPPER, steps=[[1, 1]])
    unrolled = variant(ratio=1, exits=None, graphs={"encoder": "a"}, steps=[[1, 1]])
    assert backbones({"a": variant(ratio=1), "b": stepper, "c": unrolled}) == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": []}, "at least one positive number in each group"),
        ({"steps": [[1], []]}, "at least one positive number in each group"),
        ({"steps": [[1, -1]]}, "at least one positive number in each group"),
        ({"steps": [[float("inf")]]}, "at least one positive number in each group"),
        ({"exits": None, "graphs": STEPPER}, "the role embed belongs to a variant with steps"),
        ({"exits": None, "graphs": STEPPER, "steps": [[1], [1]]}, "has the roles embed, head, step-0, step-1"),
        ({"exits": None, "graphs": TWO_GROUPS, "steps": [[1, 1]]}, r"has the roles embed, head, step \["),
        ({"exits": [1, 2], "graphs": STEPPER, "steps": [[1, 1]]}, "has the roles embed, head, head-1, head-2, step"),
        ({"exits": [2, 4], "steps": [[1, 1, 1]]}, r"the last of exits \[2, 4\] is not the last step"),
        ({"task": "text-generation"}, "generation belongs to the tasks text-generation and text2text-generation"),
        ({"generation": GENERATION}, "generation belongs to the tasks text-generation and text2text-generation"),
        ({"task": "text-generation", "generation": GENERATION}, "task text-generation has the roles decoder"),
        ({"exits": None, "graphs": {"decoder": "a"}}, "the role decoder belongs to the tasks text-generation and"),
    ],
)
def test_wrong_steps_and_roles(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        manifest(**changes)


# --- encoder and decoder --------------------------------------------------------------------------------------------

ASSEMBLED: dict[str, Any] = {
    "exits": None,
    "graphs": {"encoder": "a", "decoder": "b", "decoder-with-past": "c"},
    "assembly": {"encoder": [1, 1, 2], "decoder": [4]},
}
SEQ2SEQ = Generation(eos_ids=[1], bos_id=None, pad_id=0, max_positions=None, decoder_start_ids=[0], forced_bos_id=7)


def test_an_assembly_reads_and_writes() -> None:
    assert "assembly" not in variant().model_dump()
    found = manifest(task="text2text-generation", generation=SEQ2SEQ, **ASSEMBLED)
    document = found.model_dump(mode="json")
    assert document["variants"]["v"]["assembly"] == {"encoder": [1, 1, 2], "decoder": [4]}
    assert document["generation"] == {
        "eos_ids": [1],
        "bos_id": None,
        "pad_id": 0,
        "max_positions": None,
        "decoder_start_ids": [0],
        "forced_bos_id": 7,
    }
    assert Manifest.model_validate_json(found.model_dump_json()) == found
    assert tile_cache_name("present", 2, "encoder", "key") == "present.2.encoder.key"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generation": GENERATION}, "decoder_start_ids belong to the task text2text-generation"),
        ({"task": "text-generation"}, "decoder_start_ids belong to the task text2text-generation"),
        ({"graphs": {"encoder": "a", "decoder": "b"}, "assembly": None}, "alone, or both and decoder-with-past"),
        ({"graphs": {"decoder": "b"}}, "assembly: belongs to a variant with the role decoder-with-past"),
        ({"graphs": {"decoder": "b"}, "assembly": None}, "has the roles decoder, decoder-with-past, encoder"),
        ({"task": "feature-extraction", "generation": None}, "the role decoder belongs to the tasks"),
        ({"assembly": {"encoder": [1]}}, "tile sizes from 1 on of an encoder and a decoder"),
        ({"assembly": {"encoder": [1], "decoder": []}}, "tile sizes from 1 on of an encoder and a decoder"),
        ({"assembly": {"encoder": [1], "decoder": [0]}}, "tile sizes from 1 on of an encoder and a decoder"),
        ({"assembly": {"encoder": [1], "head": [1]}}, "assembly.head"),
    ],
)
def test_wrong_assemblies(changes: dict[str, Any], message: str) -> None:
    facts: dict[str, Any] = {"task": "text2text-generation", "generation": SEQ2SEQ, **ASSEMBLED, **changes}
    with pytest.raises(ValidationError, match=message):
        manifest(**facts)


def test_settings_of_generation_are_known_ones() -> None:
    facts: dict[str, Any] = {"eos_ids": [1], "bos_id": None, "pad_id": 0, "max_positions": None}
    assert Generation(**facts, defaults={"num_beams": 4}).defaults == {"num_beams": 4}
    assert Generation(**facts).positions > 1 << 30 and GENERATION.positions == 64
    with pytest.raises(ValidationError, match="no setting of generation is named beams"):
        Generation(**facts, defaults={"beams": 4})


def test_cost_of_steps() -> None:
    first = Cost(fixed=5, per_token=10, per_pair=2, per_source=7, per_source_pair=2)
    assert first.macs(1, source=6) == 5 + 10 + 2 + 7 * 6 + 2 * 6
    assert first.macs(3, source=6) == 5 + 30 + 18 + 42 + 36
    later = first.model_copy(update={"per_source": 0})
    assert later.token_macs(4, source=6) == 5 + 10 + 2 * 5 + 2 * 6
    assert later.token_macs(0, source=6) == later.macs(1, source=6)
