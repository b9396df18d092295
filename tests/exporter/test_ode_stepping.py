"""Lists of steps: which there are for a ratio, which are refused, and what a checkpoint says of them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compexport.errors import InputError
from exporter import sharing
from exporter.backbone import load_backbone
from exporter.checkpoint import MethodCheckpoint
from exporter.hosts import HOSTS
from exporter.methods.ode_stepping import (
    Stepping,
    described_stepping,
    ratios_that_work,
    stepping_for_ratio,
    usual_ratios_of,
    warnings_of,
    warnings_of_checkpoint,
)


def checkpoint(**settings: Any) -> MethodCheckpoint:
    return MethodCheckpoint(Path("model"), "ode", "", {}, settings)


@pytest.mark.parametrize("ratio, n", [(1, 12), (1.2, 10), (1.5, 8), (2, 6), (2.4, 5), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_even_steps_of_a_ratio(ratio: float, n: int) -> None:
    stepping = stepping_for_ratio((12,), ratio)
    assert stepping.n == n
    assert len(set(stepping.steps[0])) == 1
    assert stepping.total == pytest.approx(12)
    assert stepping.is_full == (ratio == 1)


def test_steps_never_cross_groups_and_sum_to_each() -> None:
    stepping = stepping_for_ratio((6, 4, 2), 2)
    assert stepping.steps == ((2.0, 2.0, 2.0), (2.0, 2.0), (2.0,))
    assert [math.fsum(group) for group in stepping.steps] == [6, 4, 2]
    assert list(stepping) == [(0, 2.0)] * 3 + [(1, 2.0)] * 2 + [(2, 2.0)]


@pytest.mark.parametrize("groups, ratio", [((12,), 5), ((12,), 24), ((6, 4), 3), ((4,), 0.5)])
def test_a_ratio_that_does_not_work_names_those_that_do(groups: tuple[int, ...], ratio: float) -> None:
    with pytest.raises(InputError) as caught:
        stepping_for_ratio(groups, ratio)
    working = ", ".join(f"{one:g}" for one in ratios_that_work(groups))
    assert f"no whole number of steps at ratio {ratio:g}: got {' + '.join(map(str, groups))} iterations" in str(
        caught.value
    )
    assert f"expected a ratio among {working};" in str(caught.value)


def test_ratios_that_work() -> None:
    assert ratios_that_work((12,)) == [1, 1.2, 1.5, 2, 2.4, 3, 4, 6, 12]
    assert ratios_that_work((6, 4)) == [1, 2]
    assert ratios_that_work((1,)) == [1]


@pytest.mark.parametrize(
    "form, steps, message",
    [
        ("euler", [[1.0]], "form of a step: got 'euler', expected block or sublayer"),
        ("block", [[1.0, -1.0]], "size of a step: got -1.0, expected a positive number"),
        ("block", [[1.0, 0.0]], "size of a step: got 0.0"),
        ("block", [[1.0, math.inf]], "size of a step: got inf"),
        ("block", [[1.0], []], "steps: got [[1.0], []], expected at least one for every group"),
        ("block", [], "expected at least one for every group"),
        ("block", "fast", "f: no steps: got fast, expected [[dt, …] per group]"),
        ("block", [1.0], "f: no steps"),
    ],
)
def test_lists_that_are_none(form: Any, steps: Any, message: str) -> None:
    with pytest.raises(InputError) as caught:
        Stepping.from_document(form, steps, "f")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_lists_that_do_not_fit_a_model() -> None:
    stepping = Stepping("block", ((3.0, 2.0), (1.0,)))
    assert stepping.require_fit((5, 1)) is stepping
    with pytest.raises(InputError, match=r"sum of the steps of group 1: got 5 \(3, 2\), expected 4"):
        stepping.require_fit((4, 2))
    with pytest.raises(InputError, match="steps: groups: got 2, expected 1"):
        stepping.require_fit((6,))
    with pytest.raises(InputError, match="numbers of steps: got .2., expected at least one for each of 2 groups"):
        Stepping.even((4, 4), (2,))


def test_long_steps_are_warned_of() -> None:
    assert warnings_of(stepping_for_ratio((12,), 1.5)) == []
    for form, reason in (("block", "weight -1"), ("sublayer", "each sublayer is counted")):
        (line,) = warnings_of(stepping_for_ratio((12,), 2, form))  # type: ignore[arg-type]
        assert line.startswith("6 steps instead of 12: a step of 2 is at least 2,")
        assert reason in line
    assert "a step of 5 is" in warnings_of(Stepping("block", ((5.0, 1.0),)))[0]


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (None, "--fewest-steps 3"),
        ({"fewest_steps": 4}, "--fewest-steps 3"),
        ({"fewest_steps": "3"}, "--fewest-steps 3"),
        ({"fewest_steps": 3}, "was trained for it"),
    ],
)
def test_steps_that_a_model_was_trained_for(training: dict[str, Any] | None, said: str) -> None:
    trained = checkpoint(form="sublayer", training=training)
    (line,) = warnings_of_checkpoint(stepping_for_ratio((12,), 4), trained)
    assert said in line
    (other,) = warnings_of_checkpoint(stepping_for_ratio((12,), 4, "block"), trained)
    assert "--fewest-steps 3" in other
    assert warnings_of_checkpoint(stepping_for_ratio((12,), 1.5), trained) == []


def test_steps_of_a_checkpoint() -> None:
    found = checkpoint(form="sublayer", steps={"2": [[3, 1, 2]], "1.5": [[1, 1, 2, 2]]})
    assert described_stepping(found, (6,), 2) == Stepping("sublayer", ((3.0, 1.0, 2.0),))
    assert described_stepping(found, (6,), 1.5).n == 4
    assert described_stepping(found, (6,), 3) == Stepping("sublayer", ((3.0, 3.0),))
    assert described_stepping(found, (6,), 2, "block") == Stepping("block", ((2.0, 2.0, 2.0),))
    assert described_stepping(found, (6,), 1).is_full
    assert described_stepping(None, (6,), 2) == Stepping("sublayer", ((2.0, 2.0, 2.0),))
    with pytest.raises(InputError, match=r"model: steps of ratio 2: got 2 steps of 6; they are ratio 3"):
        described_stepping(checkpoint(steps={"2": [[3, 3]]}), (6,), 2)
    with pytest.raises(InputError, match=r"model: steps of ratio 2: sum of the steps: got 5"):
        described_stepping(checkpoint(steps={"2": [[2, 3]]}), (6,), 2)


# --- what a folder says ----------------------------------------------------------------------------------------------


def test_kinds_that_may_share() -> None:
    assert sorted(sharing.MODEL_TYPES) == sorted(name for name, host in HOSTS.items() if host.sharing is not None)


@pytest.mark.parametrize(
    "name, task, groups",
    [
        ("tiny-albert", "feature-extraction", (6,)),
        ("tiny-albert-groups", "feature-extraction", (2, 2)),
        ("tiny-gpt2-shared", "text-generation", (6,)),
    ],
)
def test_groups_of_a_folder_without_loading_it(
    name: str, task: str, groups: tuple[int, ...], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.backbone.load_backbone", None)
    folder = tiny(name, task)
    assert sharing.groups_of_folder(folder) == groups
    assert sharing.may_share(folder)


def test_albert_shares_its_iterations_out_as_transformers_does() -> None:
    assert sharing.iterations_of_groups(12, 1) == [12]
    assert sharing.iterations_of_groups(12, 5) == [3, 2, 3, 2, 2]
    assert sharing.iterations_of_groups(2, 3) == [1, 1, 0]
    with pytest.raises(InputError, match="num_hidden_groups: got 0, expected at least 1"):
        sharing.iterations_of_groups(2, 0)


def test_folders_that_say_nothing(tmp_path: Path, tiny: Callable[..., Path]) -> None:
    assert not sharing.may_share(tmp_path)
    assert not sharing.may_share(tiny("tiny-bert"))
    with pytest.raises(InputError, match="got 'bert', expected albert, gpt2; make a model .* --share 1 --data D"):
        sharing.groups_of_folder(tiny("tiny-bert"))
    with pytest.raises(InputError, match="got 'roberta', expected albert, gpt2$"):
        sharing.groups_of_folder(tiny("tiny-roberta"))
    with pytest.raises(InputError, match="not a model: got no config.json"):
        sharing.groups_of_folder(tmp_path)


@pytest.mark.parametrize("stated", [[6, 1], [0, 6], "all", [3.0, 3.0], []])
def test_groups_that_do_not_share_the_layers_out(stated: Any, tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((tiny("tiny-gpt2-shared", "text-generation") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "shared_layers": stated}))
    weights = tiny("tiny-gpt2-shared", "text-generation") / "model.safetensors"
    (tmp_path / "model.safetensors").write_bytes(weights.read_bytes())
    for read in (sharing.groups_of_folder, load_backbone):
        with pytest.raises(InputError, match=r"shared_layers: got .*, expected numbers of layers, 6 together"):
            read(tmp_path)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": [[3, 3]]}, "steps: got .*, expected a table by ratio"),
        ({"steps": {"two": [[3, 3]]}}, "steps: got .*, expected a table by ratio"),
        ({"steps": {"2": 3}}, "steps of ratio 2: no steps: got 3"),
        ({"form": "euler"}, "form of a step: got 'euler', expected block or sublayer"),
    ],
)
def test_checkpoints_that_say_nonsense(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    checkpoint = MethodCheckpoint(tmp_path, "ode", "", {}, settings)
    with pytest.raises(InputError, match=f"{tmp_path}: {message}"):
        described_stepping(checkpoint, (6,), 2)


def test_ratios_where_none_are_named() -> None:
    assert usual_ratios_of((12,)) == [2, 3, 4] and usual_ratios_of((6, 6)) == [2, 3]
    assert usual_ratios_of((5,)) == [1.25] and usual_ratios_of((1,)) == []
