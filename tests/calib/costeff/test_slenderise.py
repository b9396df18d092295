"""What is important, which parts leave, and that nothing changes where nothing of use is taken away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from calib.costeff.importance import Importance, gradient_sums, importance, scored_weights
from calib.costeff.slenderise import events, most_important, slenderise
from exporter.backbone import load_backbone
from exporter.methods.costeff import CosteffModel, HostFacts, SlenderShape
from tests.models import FFN, HEADS, HIDDEN, LAYERS

pytestmark = pytest.mark.usefixtures("one_thread")
LAYER = "bert.encoder.layer.0."
IDS = torch.tensor([[2, 40, 50, 60, 3], [2, 70, 80, 3, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])


@pytest.fixture
def model(tiny: Callable[..., Path]) -> CosteffModel:
    torch.manual_seed(0)
    return CosteffModel.from_backbone(load_backbone(tiny("tiny-bert", "sequence-classification")))


def rebuilt(model: CosteffModel, tensors: dict[str, Tensor]) -> CosteffModel:
    return CosteffModel.from_tensors(tensors, model.facts, "test").eval()


def equal_scores(model: CosteffModel) -> list[Importance]:
    return [Importance(torch.ones(HEADS), torch.ones(FFN)) for _ in range(LAYERS)]


def test_importance_by_hand() -> None:
    # H = 2, two heads of width 2, three neurons.
    weights = {
        f"{LAYER}attention.output.dense.weight": torch.tensor([[1.0, -2.0, 0.0, 3.0], [0.5, 1.0, -1.0, 0.0]]),
        f"{LAYER}intermediate.dense.weight": torch.tensor([[1.0, -1.0], [2.0, 0.0], [0.0, -3.0]]),
        f"{LAYER}output.dense.weight": torch.tensor([[1.0, 0.0, -1.0], [2.0, 1.0, 1.0]]),
    }
    gradients = {
        f"{LAYER}attention.output.dense.weight": torch.tensor([[1.0, 1.0, 5.0, 2.0], [2.0, 0.0, 1.0, 7.0]]),
        f"{LAYER}intermediate.dense.weight": torch.tensor([[1.0, 2.0], [3.0, 9.0], [4.0, 0.5]]),
        f"{LAYER}output.dense.weight": torch.tensor([[2.0, 8.0, 1.0], [1.0, 1.0, 0.0]]),
    }
    (found,) = importance(weights, gradients, head_size=2)
    assert found.heads.tolist() == [1 + 1 + 2 + 0, 0 + 1 + 6 + 0]
    assert found.neurons.tolist() == [1 + 2 + 2 + 2, 6 + 0 + 0 + 1, 0 + 1.5 + 1 + 0]


def test_gradients_of_opposite_batches_do_not_cancel() -> None:
    weight = torch.tensor([1.0, 2.0], requires_grad=True)
    sums = gradient_sums({"w": weight}, [lambda: weight.sum(), lambda: -2 * weight[0]])
    assert sums["w"].tolist() == [3.0, 1.0] and weight.grad is None


def test_all_that_is_scored_is_found(model: CosteffModel) -> None:
    names = scored_weights(dict(model.named_parameters()))
    assert len(names) == 3 * LAYERS and {name.split(".")[3] for name in names} == {"0", "1"}


def test_the_most_important_keep_their_order() -> None:
    assert most_important(torch.tensor([3.0, 1.0, 2.0, 4.0]), 3) == [0, 2, 3]
    assert most_important(torch.ones(5), 2) == [0, 1]


def test_full_widths_are_the_identity(model: CosteffModel) -> None:
    made = slenderise(model.state_dict(), model.shape, equal_scores(model), model.facts.head_width)
    before = model.state_dict()
    assert made.keys() == before.keys() and all(torch.equal(made[name], before[name]) for name in made)


def test_the_whole_rank_changes_nothing(model: CosteffModel) -> None:
    shape = SlenderShape(model.shape.heads, model.shape.neurons, HIDDEN)
    slender = rebuilt(model, slenderise(model.state_dict(), shape, equal_scores(model), model.facts.head_width))
    assert slender.shape == shape
    for ours, theirs in zip(slender(IDS, MASK).logits, model.eval()(IDS, MASK).logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_what_does_nothing_leaves_without_a_trace(model: CosteffModel) -> None:
    width = model.facts.head_width
    silent_heads, silent_neurons = [(1,), (0, 3)], [range(5, 20), range(0, 64, 3)]
    with torch.no_grad():
        for layer in range(LAYERS):
            tensors = dict(model.named_parameters())
            out = tensors[f"bert.encoder.layer.{layer}.attention.output.dense.weight"]
            for head in silent_heads[layer]:
                out[:, head * width : (head + 1) * width] = 0
            tensors[f"bert.encoder.layer.{layer}.output.dense.weight"][:, list(silent_neurons[layer])] = 0
    scores = [
        Importance(
            torch.tensor([0.0 if head in silent_heads[layer] else 1.0 for head in range(HEADS)]),
            torch.tensor([0.0 if neuron in silent_neurons[layer] else 1.0 for neuron in range(FFN)]),
        )
        for layer in range(LAYERS)
    ]
    heads = tuple(HEADS - len(silent_heads[layer]) for layer in range(LAYERS))
    neurons = tuple(FFN - len(silent_neurons[layer]) for layer in range(LAYERS))
    shape = SlenderShape(heads, neurons, None)
    slender = rebuilt(model, slenderise(model.state_dict(), shape, scores, width))
    assert slender.shape == shape and slender.params < model.params
    for ours, theirs in zip(slender(IDS, MASK).logits, model.eval()(IDS, MASK).logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_events_lead_to_the_target_in_equal_steps() -> None:
    facts = HostFacts(2, 768, 12, 3072, word_width=768, vocabulary=9, positions=9, types=2)
    full, target = SlenderShape.full(facts), SlenderShape.uniform(2, 2, 512, 128)
    official = events(full, target, facts, heads_per_event=1)
    assert [one.heads[0] for one in official] == list(range(11, 1, -1))
    assert official[4] == SlenderShape.uniform(2, 7, 3072 - 1280, 768 - 320) and official[-1] == target
    fewer = events(full, target, facts, heads_per_event=4)
    assert [one.heads[0] for one in fewer] == [9, 5, 2] and fewer[-1] == target
    # No head leaves, but neurons do: one event. On from a factorised table, and with widths of each layer's own.
    assert events(target, SlenderShape.uniform(2, 2, 256, 128), facts, 1) == [SlenderShape.uniform(2, 2, 256, 128)]
    uneven = SlenderShape((1, 2), (100, 512), 64)
    assert events(target, uneven, facts, 1) == [uneven]
