"""What a stage trains and what it leaves alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.batches import collate_for, tokenise
from calib.clock import Clock
from calib.costeff.plan import Kind, Stage
from calib.costeff.settings import CosteffSettings
from calib.costeff.stages import (
    HIDDEN_SHARE,
    Lesson,
    Material,
    exit_accuracies,
    measure_importance,
    train_stage,
    wants_answers,
)
from calib.data import Examples
from calib.progress import silent
from compexport.errors import CompexportError
from exporter.backbone import Backbone, load_backbone
from exporter.methods.costeff import CosteffModel
from tests.models import FFN, HEADS, LAYERS, TEXTS

pytestmark = pytest.mark.usefixtures("one_thread")
LABELS = [n % 2 for n in range(len(TEXTS))]


@pytest.fixture
def backbone(tiny: Callable[..., Path]) -> Backbone:
    return load_backbone(tiny("tiny-bert", "sequence-classification"))


@pytest.fixture
def material(backbone: Backbone) -> Material:
    rows = tokenise(backbone, Examples(TEXTS), 16, LABELS)
    settings = CosteffSettings(batch_size=4, precision="fp32")
    return Material(rows, collate_for(backbone), settings, silent)


def model(backbone: Backbone, **how: bool) -> CosteffModel:
    torch.manual_seed(0)
    return CosteffModel.from_backbone(backbone, **how)


def stage(kind: Kind, rate: float = 1e-2) -> Stage:
    return Stage(kind, kind, 1.0, rate, 1.0, seed=3)


def copied(one: CosteffModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in one.state_dict().items()}


def changed(one: CosteffModel, before: dict[str, Tensor]) -> set[str]:
    return {name for name, tensor in one.state_dict().items() if not torch.equal(tensor, before[name])}


def trained(kind: Kind, student: CosteffModel, teacher: CosteffModel | None, material: Material) -> int:
    return train_stage(stage(kind), student, teacher, material, Clock(time.monotonic(), 4))


def test_a_frozen_body_gets_exits_and_nothing_else(backbone: Backbone, material: Material) -> None:
    student = model(backbone, highway_dense=True)
    before = copied(student)
    assert trained("exits", student, None, material) == 4
    assert changed(student, before) == {name for name in before if ".highway." in name} and before
    batch = {name: one for name, one in material.collate(material.rows).items() if name != "labels"}
    with torch.no_grad():
        assert torch.equal(student(**batch).logits[-1], backbone.model(**batch).logits)


@pytest.mark.parametrize("kind", ["assist", "prediction", "slenderise"])
def test_all_of_a_student_is_trained_and_nothing_of_its_teacher(
    backbone: Backbone, material: Material, kind: Kind
) -> None:
    student, teacher = model(backbone, pooler_dense=False), model(backbone, highway_dense=True)
    before, taught = copied(student), copied(teacher)
    trained(kind, student, teacher, material)
    # Softmax takes no notice of what all keys have in common; rows of absent words get no gradient, but decay.
    assert set(before) - changed(student, before) <= {name for name in before if name.endswith("key.bias")}
    assert not changed(teacher, taught)
    assert not any(one.requires_grad for one in student.parameters()) and not student.training


def test_hidden_states_teach_no_exit(backbone: Backbone, material: Material) -> None:
    student, teacher = model(backbone, pooler_dense=False), model(backbone)
    with torch.no_grad():
        for one in student.bert["encoder"]["layer"].parameters():  # type: ignore[index]
            one.mul_(0.9)
    before = copied(student)
    trained("hidden", student, teacher, material)
    heads = {name for name in before if "classifier" in name}
    assert heads and not changed(student, before) & heads
    assert changed(student, before) >= {name for name in before if "dense.weight" in name}


def test_slenderising_mends_the_hidden_states_first(backbone: Backbone, material: Material) -> None:
    """The exits get their first gradient when the share of the hidden states is over."""
    for steps, taught in ((7, False), (10, True)):
        student, teacher = model(backbone, pooler_dense=False), model(backbone)
        before, clock = copied(student), Clock(time.monotonic(), 10)
        stopped = stage("slenderise")

        def until(message: str, done: float | None = None, total: float | None = None, last: int = steps) -> None:
            if (done or 0) >= last:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            train_stage(stopped, student, teacher, replace(material, progress=until), clock)
        exits = {name for name in before if "classifier" in name}
        assert (changed(student, before) >= exits) is taught and bool(changed(student, before) & exits) is taught
    assert [wants_answers("slenderise", share) for share in (0.0, 0.69, HIDDEN_SHARE, 1.0)] == [
        False,
        False,
        True,
        True,
    ]
    kinds: tuple[Kind, ...] = ("assist-hidden", "assist", "exits", "hidden", "prediction")
    assert [wants_answers(kind, 0.0) for kind in kinds] == [False, True, True, False, True]


def test_dropout_is_for_students_with_a_teacher(backbone: Backbone) -> None:
    student, teacher = model(backbone), model(backbone)
    taught = Lesson(student, teacher).train()
    assert student.training and not teacher.training and not taught.training
    assert not Lesson(student, None).train().student.training


def test_every_head_and_neuron_is_scored(backbone: Backbone, material: Material) -> None:
    student, teacher = model(backbone, pooler_dense=False), model(backbone)
    with torch.no_grad():  # a head and a neuron that do nothing, whatever they compute
        layer = student.bert["encoder"]["layer"][1]  # type: ignore[index]
        layer.attention["output"].dense.weight[:, : student.facts.head_width] = 0
        layer.intermediate["dense"].weight[7] = 0
        layer.output.dense.weight[:, 7] = 0
    before = copied(student)
    scores = measure_importance(stage("slenderise"), student, teacher, material)
    assert [(len(one.heads), len(one.neurons)) for one in scores] == [(HEADS, FFN)] * LAYERS
    assert scores[1].heads[0] == 0 and scores[1].neurons[7] == 0
    assert all((one.heads[1:] > 0).all() for one in scores) and (scores[0].neurons > 0).float().mean() > 0.9
    assert not changed(student, before) and not any(one.requires_grad for one in student.parameters())


def test_states_tell_what_is_important_too(backbone: Backbone, material: Material) -> None:
    """Exits that answer alike whatever they read: heads matter by what the teacher's states have of them."""
    student, teacher = model(backbone, pooler_dense=False), model(backbone, pooler_dense=False)
    with torch.no_grad():
        for one in (student, teacher):
            for name, parameter in one.named_parameters():
                if "classifier" in name:
                    parameter.zero_()
        student.bert["encoder"]["layer"][0].output.dense.weight.mul_(2)  # type: ignore[index]
    scores = measure_importance(stage("slenderise"), student, teacher, material)
    assert all((one.heads > 0).all() for one in scores)


def test_what_every_exit_gets_right(backbone: Backbone, material: Material) -> None:
    one = model(backbone)
    batch = material.collate(material.rows)
    truth = batch.pop("labels")
    with torch.no_grad():
        wanted = [float((logits.argmax(-1) == truth).float().mean()) for logits in one(**batch).logits]
    assert exit_accuracies(one, material.rows, material, "test") == pytest.approx(wanted)


def test_numbers_that_are_none_end_the_run(backbone: Backbone, material: Material) -> None:
    student, teacher = model(backbone), model(backbone)
    with torch.no_grad():
        teacher.classifier.bias.fill_(float("nan"))
    with pytest.raises(CompexportError, match="training diverged: got NaN"):
        trained("prediction", student, teacher, material)
