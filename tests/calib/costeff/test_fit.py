"""A whole family from a pre-trained tiny model: what it learns, what is written, and that it goes on after a stop."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from calib.costeff import course, stages
from calib.costeff.fit import CosteffResult, Start, fit_costeff, open_start, run_description
from calib.costeff.importance import Importance
from calib.costeff.losses import LABELS_SHARE, label_error
from calib.costeff.plan import Stage, plan
from calib.costeff.settings import CosteffSettings
from calib.costeff.stages import Material, measure_importance
from calib.data import Examples
from calib.finetune import RECORD
from calib.labels import label_ids
from calib.unfinished import Unfinished
from compexport.errors import InputError
from exporter.backbone import load_backbone
from exporter.checkpoint import find_checkpoint
from exporter.methods.costeff import CosteffModel, SlenderShape, shape_for_ratio
from exporter.methods.slender_weights import official_names
from tests.models import FFN, HEADS, HIDDEN, LAYERS, TEXTS

pytestmark = pytest.mark.usefixtures("one_thread")
# The first word tells the label.
LABELS = [("bad", "good")[n % 2] for n in range(96)]
TOLD = Examples([f"{label} {TEXTS[n % 8]} {n}" for n, label in enumerate(LABELS)], labels=list(LABELS))
DEV = TOLD.take(range(64, 96))
TRAIN = TOLD.take(range(64))
QUICK = CosteffSettings(steps=20, batch_size=8, max_length=16, precision="fp32", heads_per_event=1, importance_rows=16)


def shapes(start: Start, *ratios: float) -> dict[float, SlenderShape]:
    return {ratio: shape_for_ratio(start.facts, ratio) for ratio in ratios}


def fitted(folder: Path, work: Path, *ratios: float, settings: CosteffSettings = QUICK, **how: Any) -> CosteffResult:
    start = open_start(folder, TRAIN)
    targets = shapes(start, *ratios)
    return fit_costeff(start, TRAIN, DEV, targets, settings=settings, unfinished=Unfinished(work), **how)


def equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def learnt(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[CosteffResult, Path]:
    work = tmp_path_factory.mktemp("costeff")
    settings = CosteffSettings(
        epochs=12, batch_size=16, max_length=16, learning_rate=3e-3, precision="fp32", importance_rows=32
    )
    done = fitted(tiny(), work / "unfinished", 1, 2, 4, settings=settings)
    done.save(work / "out")
    return done, work


def test_labels_are_learnt_by_every_exit_of_every_ratio(learnt: tuple[CosteffResult, Path]) -> None:
    record = learnt[0].record
    assert record["teacher"] > 0.9 and record["labels"] == ["bad", "good"]
    for ratio in ("1", "2", "4"):
        assert len(record["exits"][ratio]) == LAYERS
        assert min(record["exits"][ratio]) > 0.8, record["exits"]  # the most common label has 0.5
        assert record["student"][ratio] == record["exits"][ratio][-1]
        assert record["exits_mean"][ratio] == pytest.approx(sum(record["exits"][ratio]) / LAYERS)
    assert min(record["assistant"]) > 0.8 and record["finetuned"]
    assert record["steps"] == sum(one["steps"] for one in record["stages"].values())
    assert (record["texts"], record["held_out"]) == (64, 32)


def test_what_is_written(learnt: tuple[CosteffResult, Path]) -> None:
    done, work = learnt
    found = find_checkpoint(work / "out", "costeff")
    backbone = load_backbone(work / "out")
    assert found is not None and found.ratios == [1, 2, 4] and (work / "out" / RECORD).is_file()
    assert (backbone.task, backbone.labels) == ("sequence-classification", ["bad", "good"])
    wanted = {"2": SlenderShape.uniform(LAYERS, 2, 32, 16), "4": SlenderShape.uniform(LAYERS, 1, 16, 8)}
    for ratio in (2, 4):
        slender = CosteffModel.from_tensors(found.load(ratio), backbone, "test")
        assert slender.shape == wanted[str(ratio)] and slender.ratio == pytest.approx(ratio, rel=0.01)
        assert done.record["extra_params"][str(ratio)] == slender.params
        assert found.settings["shapes"][str(ratio)] == slender.shape.document()
        assert not slender.pooler_dense and not slender.highway_dense and slender.mean
        assert found.settings["training"][str(ratio)]["exits"] == done.record["exits"][str(ratio)]
    assert found.settings["shapes"]["1"] == SlenderShape.uniform(LAYERS, HEADS, FFN).document()


def test_beside_a_frozen_backbone_only_exits_are_stored(learnt: tuple[CosteffResult, Path]) -> None:
    folder = learnt[1] / "out"
    found, backbone = find_checkpoint(folder), load_backbone(folder)
    assert found is not None
    exits = found.load(1)
    assert exits and all(name.startswith("bert.encoder.highway.") for name in exits)
    assert sum(one.numel() for one in exits.values()) == (LAYERS - 1) * (2 * HIDDEN * HIDDEN + HIDDEN + 2 * HIDDEN + 2)
    whole = CosteffModel.from_tensors({**official_names(backbone, 2), **exits}, backbone, "test").eval()
    ids, mask = torch.tensor([[2, 40, 50, 3]]), torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        assert torch.equal(whole(ids, mask).logits[-1], backbone.model(ids, mask).logits)


def test_only_what_is_needed_is_kept_meanwhile(learnt: tuple[CosteffResult, Path]) -> None:
    kept = {path.parent.name for path in (learnt[1] / "unfinished").rglob("result.safetensors")}
    assert kept == {"r1-exits", "2-assist", "r2-5-prediction", "r4-5-prediction"}
    assert not list((learnt[1] / "unfinished").rglob("checkpoint-*"))


def test_a_fine_tuned_model_is_not_fine_tuned_again(learnt: tuple[CosteffResult, Path], tmp_path: Path) -> None:
    said: list[str] = []
    folder = learnt[1] / "out"
    done = fitted(folder, tmp_path / "u", 1, 2.5, progress=lambda message, *_: said.append(message))
    assert "the model classifies into these labels already: it is not fine-tuned again" in said
    assert not done.record["finetuned"] and "1-finetune" not in done.record["stages"]
    assert done.record["teacher"] == learnt[0].record["teacher"]
    assert set(done.tensors) == {1, 2.5}
    # Into a copy of the same model, whose other ratios stay.
    learnt[0].save(tmp_path / "copy")
    done.save(tmp_path / "copy")
    found = find_checkpoint(tmp_path / "copy")
    assert found is not None and found.ratios == [1, 2, 2.5, 4]
    assert set(found.settings["shapes"]) == set(found.settings["training"]) == {"1", "2", "2.5", "4"}
    assert found.settings["training"]["4"]["exits"] == learnt[0].record["exits"]["4"]
    assert found.settings["training"]["2.5"]["texts"] == 64


def test_one_label_per_text(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """A head for several labels is refused where it would be used; where a new one takes its place it is no matter."""
    folder = Path(shutil.copytree(tiny("tiny-bert", "sequence-classification"), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    for names, finetuned in ((["x", "y"], False), (["bad", "good"], None)):
        changes = {"problem_type": "multi_label_classification", "id2label": dict(enumerate(names))}
        changes["label2id"] = {name: number for number, name in enumerate(names)}
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        if finetuned is None:
            with pytest.raises(InputError, match="need one label per text: got multi_label_classification"):
                open_start(folder, TRAIN)
        else:
            start = open_start(folder, TRAIN)
            assert start.finetuned is finetuned
            assert CosteffModel.from_backbone(start.backbone, num_labels=2, pooler_dense=False).num_labels == 2


def test_fine_tuning_warms_up_as_the_other_stages(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares: list[float] = []

    def finetune(*_: Any, warm_up: float, **__: Any) -> None:
        shares.append(warm_up)
        raise KeyboardInterrupt

    monkeypatch.setattr(course.tuning, "finetune", finetune)
    with pytest.raises(KeyboardInterrupt):
        fitted(tiny(), tmp_path / "u", 1)
    assert shares == [stages.WARM_UP_SHARE]


def test_jointly_the_whole_model_is_trained(learnt: tuple[CosteffResult, Path], tmp_path: Path) -> None:
    done = fitted(learnt[1] / "out", tmp_path / "u", 1, settings=replace(QUICK, joint=True, pooling="cls"))
    assert list(done.record["stages"]) == ["2-assist"] and done.record["exits"]["1"] == done.record["assistant"]
    whole = CosteffModel.from_tensors(done.tensors[1], done.backbone, "test")
    query = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(whole.state_dict()[query], official_names(done.backbone, 2)[query])


def test_the_teacher_has_a_say_in_what_leaves_first(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A student that is its teacher still has no gradients but those of the labels: it is trained before each event."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watched(stage: Stage, student: CosteffModel, teacher: CosteffModel, material: Material) -> list[Importance]:
        scores = measure_importance(stage, student, teacher, material)
        with monkeypatch.context() as patch:  # the same gradients, of the labels alone
            patch.setattr(stages, "hidden_error", lambda *_: 0.0)
            patch.setattr(
                stages, "answers_error", lambda ours, theirs, labels: LABELS_SHARE * label_error(ours, labels)
            )
            alone = measure_importance(stage, student, teacher, material)
        seen[stage.name] = scores[0].neurons, alone[0].neurons
        return scores

    monkeypatch.setattr(course, "measure_importance", watched)
    done = fitted(tiny(), tmp_path / "u", 2, settings=replace(QUICK, steps=60, learning_rate=3e-3))
    assert seen and list(seen) == [name for name in done.record["stages"] if "event" in name]
    for scores, alone in seen.values():
        assert (scores - alone).abs().max() > 0.01 * alone.abs().max()


STOPS = ["1-finetune: fit", "r2-3-event-2: importance", "r2-3-event-2: fit", "ratio 2: measure"]
MORE_STOPS = ["r1-exits: fit", "2-assist: fit", "r2-3-event-1: fit", "r2-5-prediction: fit", "backbone: measure"]


@pytest.fixture(scope="module")
def uninterrupted(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> CosteffResult:
    return fitted(tiny(), tmp_path_factory.mktemp("whole") / "u", 1, 2)


@pytest.mark.parametrize("stop", [*STOPS, *(pytest.param(stop, marks=pytest.mark.slow) for stop in MORE_STOPS)])
def test_a_stopped_run_goes_on_where_it_was(
    tiny: Callable[..., Path], tmp_path: Path, uninterrupted: CosteffResult, stop: str
) -> None:
    said: list[str] = []

    def stopping(message: str, done: float | None = None, total: float | None = None) -> None:
        said.append(message)
        if message == stop and (done or 0) >= (1 if "fit" in stop else 0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted(tiny(), tmp_path / "u", 1, 2, progress=stopping)
    before = list(dict.fromkeys(said))
    said.clear()
    done = fitted(tiny(), tmp_path / "u", 1, 2, progress=lambda message, *_: said.append(message))
    finished = [message for message in before[: before.index(stop)] if message.endswith(": fit")]
    assert not set(finished) & set(said)  # what was finished is not trained again
    assert all(equal(done.tensors[ratio], uninterrupted.tensors[ratio]) for ratio in (1, 2))
    assert done.record["exits"] == uninterrupted.record["exits"]
    assert done.record["steps"] == uninterrupted.record["steps"]


def test_the_steps_inside_a_stage_go_on_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def stopping(message: str, done: float | None = None, total: float | None = None) -> None:
        if message == "r2-4-hidden: fit" and (done or 0) >= 4:
            raise Stopped

    settings = replace(QUICK, steps=40)
    start = open_start(tiny(), TRAIN)
    targets = shapes(start, 2)
    wanted = fit_costeff(start, TRAIN, DEV, targets, settings=settings, unfinished=Unfinished(tmp_path / "whole"))
    state = Unfinished(tmp_path / "u", save_every=2)
    with pytest.raises(Stopped):
        fit_costeff(start, TRAIN, DEV, targets, settings=settings, unfinished=state, progress=stopping)
    assert state.part("r2-4-hidden").latest() is not None
    done = fit_costeff(start, TRAIN, DEV, targets, settings=settings, unfinished=state)
    assert equal(done.tensors[2], wanted.tensors[2]) and done.record["steps"] == wanted.record["steps"]


def test_time_ends_every_stage(tiny: Callable[..., Path], tmp_path: Path) -> None:
    settings = replace(QUICK, steps=None, epochs=10_000.0, max_seconds=4.0)
    done = fitted(tiny(), tmp_path / "u", 1, 2, settings=settings)
    names = [one.name for one in plan(settings, open_start(tiny(), TRAIN).facts, {}, finetuned=False)]
    assert names == ["1-finetune"] and len(done.record["stages"]) == 8
    assert all(one["steps"] >= 1 for one in done.record["stages"].values())


def test_rows_are_held_out_where_there_are_no_dev_data(tiny: Callable[..., Path], tmp_path: Path) -> None:
    start = open_start(tiny(), TRAIN)
    done = fit_costeff(start, TRAIN, None, shapes(start, 2), settings=QUICK, unfinished=Unfinished(tmp_path / "u"))
    assert (done.record["texts"], done.record["held_out"]) == (57, 7)


def test_runs_of_other_wishes_are_told_apart(tiny: Callable[..., Path]) -> None:
    start = open_start(tiny(), TRAIN)
    first = run_description(QUICK, start, shapes(start, 2), TRAIN, DEV)
    assert first == run_description(QUICK, start, shapes(start, 2), TRAIN, DEV)
    for other in (shapes(start, 4), shapes(start, 2, 4)):
        assert first != run_description(QUICK, start, other, TRAIN, DEV)
    assert first != run_description(QUICK, start, shapes(start, 2), DEV, DEV)


@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-electra", "tiny-distilbert"])
def test_other_hosts(tiny: Callable[..., Path], tmp_path: Path, name: str) -> None:
    done = fitted(tiny(name), tmp_path / "u", 1, 2)
    found = done.save(tmp_path / "out")
    slender = CosteffModel.from_tensors(found.load(2), load_backbone(tmp_path / "out"), "test")
    assert slender.ratio == pytest.approx(2, rel=0.01)
    assert label_ids(["good"], done.record["labels"]) == [1]


def test_hosts_that_the_method_does_not_fit(tiny: Callable[..., Path]) -> None:
    with pytest.raises(InputError, match="COST-EFF does not fit this architecture: got 't5', expected one of bert"):
        open_start(tiny("tiny-t5"), TRAIN)
