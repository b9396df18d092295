"""One step: what runs, what is compared, and what learns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.modular.lesson import Lesson
from calib.modular.losses import modular_loss, score_errors, states_error
from calib.sequences import UNLABELLED, tokenise_pairs
from calib.writers import collate_pairs
from exporter.backbone import load_seq2seq
from exporter.methods.assembly import Assembly
from exporter.methods.modular import ModularModel
from tests.calib.modular.conftest import examples

Folder = Callable[[str], Path]


def lesson_and_batch(folder: Path, rows: int = 6) -> tuple[Lesson, dict[str, Tensor]]:
    source = load_seq2seq(folder)
    batch = collate_pairs(source)(tokenise_pairs(source, examples(rows), 16))
    return Lesson(ModularModel(source)).eval(), batch


@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_without_modules_a_step_is_the_base(folder: Folder, name: str) -> None:
    lesson, batch = lesson_and_batch(folder(name))
    assembly = lesson.draw(0.0, seed=0, step=0)
    assert assembly == Assembly.base(lesson.modular.facts)
    with torch.no_grad():
        ours, base = lesson(assembly, **batch)
        labels = batch.pop("labels")
        wanted = lesson.modular.base(**batch, labels=labels).logits
    assert torch.equal(ours.logits, wanted) and torch.equal(base.logits, wanted)
    mask, target = batch["attention_mask"], (labels != UNLABELLED).long()
    assert float(states_error(ours, base, assembly, mask, target)) == 0.0
    assert not list(score_errors(ours, base, assembly, mask.bool(), target.bool()))


@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_with_nothing_but_modules_no_layer_of_the_base_runs(folder: Folder, name: str) -> None:
    lesson, batch = lesson_and_batch(folder(name))
    modular = lesson.modular
    assembly = lesson.draw(1.0, seed=0, step=3)
    with torch.no_grad():
        before = lesson(assembly, **batch)[0].logits
        for stack in modular.host.stacks(modular.base):
            for layer in modular.host.layers_of(stack):
                for parameter_name, one in layer.named_parameters():
                    if "relative_attention_bias" not in parameter_name:  # the stack's own
                        one.normal_(std=3.0)
        assert torch.equal(lesson(assembly, **batch)[0].logits, before)


@pytest.mark.parametrize("name", ["t5", "mbart"])
def test_only_the_modules_of_an_assembly_learn(folder: Folder, name: str) -> None:
    lesson, batch = lesson_and_batch(folder(name))
    modular = lesson.modular
    assembly = Assembly((2, 1, 1, 2), (3, 3))
    ours, base = lesson.train()(assembly, **batch)
    modular_loss(ours, base, assembly, batch["attention_mask"], batch["labels"]).backward()
    assert all(one.grad is None for one in modular.base.parameters())
    # The keys' bias changes no probability of attention: BART's has no gradient but by the scores.
    learnt = {name for name, one in modular.module_stacks.named_parameters() if one.grad is not None}
    used = ("encoder.g2.0.", "encoder.g2.2.", "decoder.g3.0.", "decoder.g3.1.")
    assert learnt == {name for name, _ in modular.module_stacks.named_parameters() if name.startswith(used)}
    modes = [tile.training for tile in modular.host.layers_of(modular.host.stacks(lesson.assembled(assembly))[0])]
    assert modes == [True, False, False, True]


def test_padding_adds_nothing_to_any_loss(folder: Folder) -> None:
    lesson, batch = lesson_and_batch(folder("t5"))
    assembly = Assembly((2, 1, 1, 2), (1, 1, 1, 3))
    longer = {name: torch.nn.functional.pad(one, (0, 3)) for name, one in batch.items()}
    longer["labels"][:, -3:] = UNLABELLED
    with torch.no_grad():
        losses = [modular_loss(*lesson(assembly, **one), assembly, one["attention_mask"], one["labels"])
                  for one in (batch, longer)]  # fmt: skip
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)
    assert float(losses[0]) > 0.0


def test_states_and_scores_are_those_of_the_last_layer_of_the_span(folder: Folder) -> None:
    """A base whose spans are a layer and one that does nothing: modules that copy the layer reproduce all states."""
    lesson, batch = lesson_and_batch(folder("t5"))
    modular = lesson.modular
    with torch.no_grad():
        for stack in modular.host.stacks(modular.base):
            for layer in list(modular.host.layers_of(stack))[1::2]:
                for parameter_name, one in layer.named_parameters():
                    if parameter_name.endswith((".o.weight", ".wo.weight")):
                        one.zero_()
        modular.module_stacks.load_state_dict(ModularModel(modular.source).module_stacks.state_dict())
        assembly = Assembly((2, 2, 2), (2, 2, 2))
        ours, base = lesson(assembly, **batch)
    mask, target = batch["attention_mask"], (batch["labels"] != UNLABELLED).long()
    assert float(states_error(ours, base, assembly, mask, target)) < 1e-10
    assert torch.equal(ours.logits, base.logits)
    # The second layer of a span sees other states than the first, so its scores differ.
    assert all(float(error) > 0.0 for error in score_errors(ours, base, assembly, mask.bool(), target.bool()))
