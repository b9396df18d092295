"""``compexport train ode``: a model that shares layers learns to be run in fewer, larger steps."""

from __future__ import annotations

from typing import Any

from compexport.api import checked_ratios
from compexport.errors import InputError, describe
from compexport.training.job import Job, given, length


def train(job: Job) -> dict[str, Any]:
    """Train the model, and write it with what says how it is run at each ratio."""
    from calib import processes, unfinished
    from calib.ode.fit import fit_ode, run_description
    from calib.ode.settings import OdeSettings

    shared = job.shared
    named = ("objective", "form", "distance_weight", "plain", "share", "iterations", "from_scratch", "exit_heads")
    own = {name: getattr(shared, name) for name in named if getattr(shared, name) is not None}
    settings = OdeSettings(lowest=shared.fewest_steps, **own, **length(job.fit), **given(job.fit)).checked()
    ratios = _ratios(job)
    if job.output.resolve() == job.model.resolve():
        raise InputError(describe(f"{job.output}: is the model itself", expected="another folder"))
    job.require_new_place("the model itself is trained")
    with processes.joined():
        job.require_resumable()
        training, dev = job.training_rows(), job.dev_rows()
        job.progress("loading the model")
        run = run_description(settings, job.model, ratios, training, dev)
        saving = job.saving
        with unfinished.keeping(job.output, run, resume=saving.resume, save_every=saving.save_every) as state:
            result = fit_ode(
                job.model, training, dev, ratios, settings=settings, unfinished=state, progress=job.progress
            )
            processes.by_first(lambda: result.save(job.output))
    return {"output": str(job.output), **result.record}


def _ratios(job: Job) -> list[float] | None:
    """The ratios that were asked for; None where the model is to say. Of ratio 1 only exits can be trained."""
    if job.ratios is None:
        return None
    ratios = [ratio for ratio in checked_ratios(job.ratios) if ratio != 1 or job.shared.exit_heads]
    if not ratios:
        raise InputError(describe("--ratio", got=1, expected="ratios above 1, like 2,3,4: 1 is the model itself"))
    return ratios
