"""``compexport train costeff``: slender models of a family of sizes, with an exit after every layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compexport.api import DEFAULT_RATIOS, checked_ratios
from compexport.errors import InputError, describe
from compexport.training.job import Job, given, length

if TYPE_CHECKING:
    from exporter.methods.costeff import HostFacts, SlenderShape


def train(job: Job) -> dict[str, Any]:
    """Fine-tune the model where it is not yet, train the slender ones, and write backbone and checkpoint."""
    from calib import processes, unfinished
    from calib.costeff.fit import fit_costeff, open_start, run_description
    from calib.costeff.settings import CosteffSettings

    slender = job.slender
    named = ("pooling", "heads_per_event", "importance_rows")
    own = {name: getattr(slender, name) for name in named if getattr(slender, name) is not None}
    settings = CosteffSettings(joint=slender.joint, **own, **length(job.fit), **given(job.fit)).checked()
    ratios = _ratios(job)
    job.require_checkpoint_place()
    with processes.joined():
        job.require_resumable()
        training, dev = job.training_rows(), job.dev_rows()
        job.progress("loading the model")
        start = open_start(job.model, training)
        targets = _targets(job, ratios, start.facts)
        if not start.finetuned:
            job.require_new_place()
        run = run_description(settings, start, targets, training, dev)
        saving = job.saving
        with unfinished.keeping(job.output, run, resume=saving.resume, save_every=saving.save_every) as state:
            result = fit_costeff(
                start, training, dev, targets, settings=settings, unfinished=state, progress=job.progress
            )
            processes.by_first(lambda: result.save(job.output))
    return {"output": str(job.output), **result.record}


def _ratios(job: Job) -> list[float]:
    """The ratios that were asked for; a preset needs none beside it."""
    asked = job.ratios
    if asked is None:
        asked = () if job.slender.preset is not None else DEFAULT_RATIOS
    ratios = checked_ratios(asked)
    if job.slender.joint and 1 not in ratios:
        hint = "the slender models are trained whole anyway"
        raise InputError(describe("--joint", got="no ratio 1", expected="--ratio 1, or 1,2,4", hint=hint))
    return ratios


def _targets(job: Job, ratios: list[float], facts: HostFacts) -> dict[float, SlenderShape]:
    """Shapes by ratio: of the ratios, and of the presets, whose ratio follows from their shape."""
    from exporter.methods.costeff import rounded_ratio, shape_for_ratio, shape_named

    targets = {ratio: shape_for_ratio(facts, ratio) for ratio in ratios}
    for name in (job.slender.preset or "").split(",") if job.slender.preset else ():
        shape = shape_named(facts, name.strip())
        ratio = rounded_ratio(shape, facts, f"preset {name}")
        if ratio in targets:
            hint = "leave one of them out"
            raise InputError(describe(f"preset {name} has a ratio that is there already", got=f"{ratio}", hint=hint))
        targets[ratio] = shape
    return dict(sorted(targets.items()))
