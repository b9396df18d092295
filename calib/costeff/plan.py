"""Which stages a family's training has, and how long each is: the official recipe, in proportion to what is asked.

A pure function of the settings and the shapes. The official recipe (SST-2, BERT-base): fine-tuning 5 passes over the
data; the teaching assistant, which is the multi-exit model at full width, 1 on the teacher's hidden states and 5 on its
answers; then, for every slender model, the passes of ``PASSES``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from calib.costeff.settings import CosteffSettings
from calib.costeff.slenderise import events
from exporter.methods.costeff import HostFacts, SlenderShape

Kind = Literal["finetune", "assist-hidden", "assist", "exits", "slenderise", "hidden", "prediction"]

FINETUNE, EXITS_ALONE, ASSISTANT_HIDDEN, ASSISTANT = "1-finetune", "r1-exits", "2-assist-hidden", "2-assist"
FULL_PASSES = 5.0  # of fine-tuning and the assistant's answers; ``epochs`` are in their place
# By heads kept of 12: passes of slenderising, on hidden states, on answers and hidden states.
PASSES = {
    2: (5, 10, 6),
    3: (5, 10, 5),
    4: (4, 9, 4),
    5: (4, 9, 4),
    6: (3, 8, 3),
    7: (2, 7, 3),
    8: (2, 6, 3),
}
RATES = {"slenderise": 0.5, "hidden": 1.5, "exits": 10.0}  # of the peak learning rate; exits alone start from nothing
RESTORE = 0.12  # the learning rate grows by so much from one event to the next
# What a step costs, in forward passes at full width: the teacher's one, the student's three with its backward pass.
FORWARD, BOTH = 1.0, 3.0


@dataclass(frozen=True)
class Stage:
    """One stage: ``name`` is its place in the unfinished run, ``epochs`` its passes, ``rate`` its peak learning rate.

    ``shape``: what the model is slenderised to at its end, the event. ``cost``: of one step. ``seed``: of its batches.
    ``source``: the stage whose model it goes on from; None where it starts from the model that was given.
    """

    name: str
    kind: Kind
    epochs: float
    rate: float
    cost: float
    seed: int
    ratio: float | None = None
    shape: SlenderShape | None = None
    source: str | None = None

    def steps(self, settings: CosteffSettings, rows: int, passes: float) -> int:
        """How many steps it has, on so many rows; ``passes``: of all stages together."""
        if settings.steps is not None:
            return max(1, round(settings.steps * self.epochs / passes))
        return max(1, round(self.epochs * -(-rows // settings.batch_size)))


def plan(
    settings: CosteffSettings,
    facts: HostFacts,
    targets: Mapping[float, SlenderShape],
    *,
    finetuned: bool,
) -> list[Stage]:
    """All stages in order; each ratio of ``targets`` goes on from the next smaller one, where that has room for it.

    ``finetuned``: the model is its own teacher already. Then it is not fine-tuned, and its copy, the assistant, has
    nothing to learn from its hidden states.
    """
    assert targets.get(1, SlenderShape.full(facts)) == SlenderShape.full(facts)
    slender = {ratio: targets[ratio] for ratio in sorted(targets) if ratio != 1}
    stages = [] if finetuned else [_stage(FINETUNE, "finetune", FULL_PASSES, BOTH)]
    if 1 in targets and not settings.joint:
        stages.append(_stage(EXITS_ALONE, "exits", FULL_PASSES, FORWARD, 1))
    if slender or (1 in targets and settings.joint):
        if not finetuned:
            stages.append(_stage(ASSISTANT_HIDDEN, "assist-hidden", FULL_PASSES // 3, FORWARD + BOTH))
        source = None if finetuned else ASSISTANT_HIDDEN
        stages.append(_stage(ASSISTANT, "assist", FULL_PASSES, FORWARD + BOTH, source=source))
    smaller = None
    for ratio, shape in slender.items():
        if smaller is not None and not fits_into(shape, slender[smaller], facts):
            smaller = None
        stages += _slender_stages(ratio, smaller, slender, facts, settings)
        smaller = ratio
    scale = settings.epochs / FULL_PASSES
    return [
        replace(one, epochs=one.epochs * scale, rate=one.rate * settings.learning_rate, seed=settings.seed + number)
        for number, one in enumerate(stages)
    ]


def _stage(
    name: str, kind: Kind, epochs: float, cost: float, ratio: float | None = None, source: str | None = None
) -> Stage:
    return Stage(name, kind, epochs, RATES.get(kind, 1.0), cost, seed=0, ratio=ratio, source=source)


def fits_into(shape: SlenderShape, before: SlenderShape, facts: HostFacts) -> bool:
    """Whether ``shape`` can be made of a model of ``before`` by taking away."""
    sizes = [*zip(shape.heads, before.heads, strict=True), *zip(shape.neurons, before.neurons, strict=True)]
    ranks = tuple(facts.word_width if one.embedding is None else one.embedding for one in (shape, before))
    return all(ours <= theirs for ours, theirs in [*sizes, ranks])


def _slender_stages(
    ratio: float,
    smaller: float | None,
    shapes: Mapping[float, SlenderShape],
    facts: HostFacts,
    settings: CosteffSettings,
) -> list[Stage]:
    shape = shapes[ratio]
    before = SlenderShape.full(facts) if smaller is None else shapes[smaller]
    slenderising, hidden, prediction = passes_for(shape, facts)
    # The official passes lead from full width; on the way from a smaller ratio, less is left to be taken away.
    kept, kept_before = 1 / shape.ratio(facts), 1 / before.ratio(facts)
    way = (kept_before - kept) / (1 - kept) if kept < 1 else 1.0
    source = ASSISTANT if smaller is None else last_stage(smaller)
    steps = events(before, shape, facts, settings.heads_per_event)
    made = []
    for number, one in enumerate(steps, start=1):
        name, cost = f"r{ratio}-3-event-{number}", FORWARD + BOTH / before.ratio(facts)
        event = _stage(name, "slenderise", slenderising * way / len(steps), cost, ratio)
        made.append(replace(event, rate=event.rate * (1 + RESTORE) ** (number - 1), shape=one, source=source))
        before, source = one, name
    cost, name = FORWARD + BOTH * kept, f"r{ratio}-4-hidden"
    made.append(_stage(name, "hidden", hidden, cost, ratio, source))
    return [*made, _stage(last_stage(ratio), "prediction", prediction, cost, ratio, name)]


def last_stage(ratio: float) -> str:
    """The stage that makes a slender model what it is."""
    return f"r{ratio}-5-prediction"


def results(targets: Sequence[float], settings: CosteffSettings) -> dict[float, str]:
    """The stage whose result is the model of each ratio."""
    first = ASSISTANT if settings.joint else EXITS_ALONE
    return {ratio: first if ratio == 1 else last_stage(ratio) for ratio in sorted(targets)}


def passes_for(shape: SlenderShape, facts: HostFacts) -> tuple[float, float, float]:
    """Official passes of the three slender stages, by the heads kept of every twelve."""
    kept = 12 * sum(shape.heads) / (facts.heads * facts.layers)
    return PASSES[min(PASSES, key=lambda heads: abs(heads - kept))]


def seconds_left(settings: CosteffSettings, stages: Sequence[Stage], number: int, spent: float) -> float | None:
    """The share of stage ``number`` in the time that is left after ``spent`` seconds; None without a limit.

    Whatever an earlier stage did not use is the later ones'.
    """
    if settings.max_seconds is None:
        return None
    weights = [stage.epochs * stage.cost for stage in stages]
    left = max(settings.max_seconds - spent, 0.0)
    return max(left * weights[number] / sum(weights[number:]), 0.001)
