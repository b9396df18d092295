"""``compexport build`` of models that share layers: what options mean, what is taken without them, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compexport import stepping
from compexport.errors import InputError
from engines.bundle import Bundle
from exporter.checkpoint import save_checkpoint
from exporter.methods.ode_stepping import Stepping
from exporter.plans import plan_of
from exporter.plans.ode import OdePlan

Cli = Callable[..., Any]


@pytest.fixture(scope="module")
def albert(tiny: Callable[..., Path]) -> Path:
    return tiny("tiny-albert", "sequence-classification")


def test_build(cli: Cli, albert: Path, tmp_path: Path) -> None:
    (tmp_path / "compexport.toml").write_text("[build]\nratio = 2\nsteps = [2.5, 2, 1.5]\nform = 'sublayer'\n")
    done = cli("build", albert, "--json")
    assert done.code == 0, done.err
    assert "3 steps instead of 6: a step of 2.5 is at least 2" in done.err
    rows = {row["variant"]: row for row in done.document["variants"]}
    assert list(rows) == ["ode-r1-fp32", "ode-r2-fp32"]
    assert rows["ode-r2-fp32"]["method"] == "ode" and 1.9 < rows["ode-r2-fp32"]["flops_ratio"] < 2
    variant = Bundle.open(tmp_path / "bundle").manifest.variants["ode-r2-fp32"]
    assert variant.steps == [[2.5, 2, 1.5]] and variant.settings["form"] == "sublayer"
    assert "ode-r2" in cli("inspect").out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--form", "euler"], "--form: got 'euler', expected block, sublayer or auto"),
        (["--form", "auto"], "--form auto chooses on texts: expected --data FILE"),
        (["--form", "auto", "--steps", "3,3"], "--form auto chooses the steps too: got --steps"),
        (["--steps", "3,x"], "--steps: got 'x', expected sizes like 3,3,2,2,1,1"),
        (["--steps", "3,2", "--ratio", "3"], "--steps: sum of the steps: got 5"),
        (["--steps", "3,3", "--ratio", "2"], "--steps of ratio 2: got 2 steps of 6; they are --ratio 3"),
        (["--steps", "3,3", "--ratio", "2,3"], "--steps are the steps of one ratio beside 1: got 2,3"),
        (["--steps", "3/3"], "--steps: groups: got 2, expected 1"),
        (["--steps", "7,-1"], "size of a step: got -1"),
        (["--ratio", "4"], "no whole number of steps at ratio 4"),
        (["--exits", "1"], "--exit-heads --data D -o OUT`"),
        (["--exits", "auto"], "--exits of the method ode: got 'auto', expected steps like 1,2,4"),
        (["--exits", "2,1"], "--exits of the method ode are steps: got 2,1, expected rising"),
        (["--method", "costeff", "--step-engine"], "--step-engine: got the method costeff, expected ode"),
        (["--method", "variator", "--form", "block"], "--form: got the method variator, expected ode"),
        (["--method", "variator", "--steps", "3,3"], "--steps of a fit: got '3,3', expected a whole number"),
    ],
)
def test_bad_input(cli: Cli, albert: Path, tmp_path: Path, options: list[str], message: str) -> None:
    done = cli("build", albert, *options)
    assert done.code == 2 and message in done.error
    assert not (tmp_path / "bundle").exists()


def test_what_is_taken_without_a_word(albert: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    assert plan_of(albert, None, None).method == "ode"
    assert plan_of(tiny("tiny-gpt2-shared", "text-generation"), None, None).method == "ode"
    assert plan_of(tiny("tiny-bert"), None, None).method == "variator"
    assert stepping.usual_ratios(albert, None, None) == [2, 3]
    assert stepping.usual_ratios(albert, None, [[2, 1, 1, 1, 1]]) == [1.2]
    listed = save_checkpoint(tmp_path / "c", albert, "ode", {"form": "block", "steps": {"1.5": [[1.5] * 4]}}, {})
    assert stepping.usual_ratios(albert, listed, None) == [1.5]


def test_steps_of_a_ratio_that_is_not_whole(tmp_path: Path) -> None:
    """3 steps of 7 iterations are ratio 2.33, of which no equal steps could be made."""
    (tmp_path / "config.json").write_text('{"model_type": "albert", "num_hidden_layers": 7}')
    sizes = [[3.0, 2.0, 2.0]]
    ratio = stepping.ratio_of(tmp_path, sizes)
    asked = stepping.Steps(sizes=sizes)
    options = stepping.plan_options(tmp_path, None, [ratio], asked, None, lambda *_: None)
    plan = OdePlan(tmp_path, (1, ratio), None, **options)
    assert [part.name for part in plan.graphs()] == ["ode-r1", "ode-r2.33"]


def test_steps_of_your_own_have_the_form_that_was_trained(albert: Path, tmp_path: Path) -> None:
    trained = save_checkpoint(tmp_path / "c", albert, "ode", {"form": "sublayer", "steps": {"2": [[2, 2, 2]]}}, {})
    for form, taken in ((None, "sublayer"), ("block", "block")):
        asked = stepping.Steps(form=form, sizes=[[3, 2, 1]])
        options = stepping.plan_options(albert, trained, [2], asked, None, lambda *_: None)
        assert options["steppings"][2].form == taken


def test_texts_choose_where_nothing_was_chosen(albert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = save_checkpoint(tmp_path / "c", albert, "ode", {"form": "block", "steps": {"2": [[2, 2, 2]]}}, {})
    found = {2: Stepping("sublayer", ((1, 2, 3),))}
    monkeypatch.setattr(stepping, "chosen_steps", lambda *_: found)

    def options(checkpoint: Any, form: str | None) -> dict[str, Any]:
        asked = stepping.Steps(form=form)
        return stepping.plan_options(albert, checkpoint, [2], asked, lambda: None, lambda *_: None)  # type: ignore

    assert options(None, None)["steppings"] == options(listed, "auto")["steppings"] == found
    assert "steppings" not in options(listed, None) and "steppings" not in options(None, "block")


def test_steps_of_groups() -> None:
    assert stepping.parsed_steps("3,3/2, 2,2") == [[3, 3], [2, 2, 2]]
    with pytest.raises(InputError, match="--steps: got ''"):
        stepping.parsed_steps("3,3/")
