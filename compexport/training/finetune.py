"""``compexport train finetune``: teaching a model the labels of the data, or to write its targets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compexport.training.job import Job, given, length

if TYPE_CHECKING:
    from calib.data import Examples
    from calib.finetune import Finetuned, FinetuneSettings


def train(job: Job) -> dict[str, Any]:
    """Fine-tune the model and write a Hugging Face folder.

    Where the data are a folder with dev.*, the accuracy there is measured.
    """
    from calib import finetune as tuning
    from calib import processes, writers

    tuning.require_place(job.output, job.model)
    settings = tuning.FinetuneSettings(**length(job.fit), **given(job.fit)).checked()
    with processes.joined():
        job.require_resumable()
        training, dev = job.training_rows(), job.dev_rows()
        job.progress("loading the model")
        taught = _written if writers.writes_targets(job.model, training) else _labelled
        result = taught(job, training, dev, settings)
    return {"output": str(job.output), **result.record}


def _labelled(job: Job, training: Examples, dev: Examples | None, settings: FinetuneSettings) -> Finetuned:
    from calib import finetune as tuning
    from calib import learners, processes, unfinished

    learner = learners.open_learner(job.model, training, job.fit.seed)
    run = tuning.run_description(settings, learner, training, dev)
    saving = job.saving
    with unfinished.keeping(job.output, run, resume=saving.resume, save_every=saving.save_every) as state:
        result = tuning.finetune(learner, training, dev, settings=settings, unfinished=state, progress=job.progress)
        processes.by_first(lambda: result.save(job.output))
    return result


def _written(job: Job, training: Examples, dev: Examples | None, settings: FinetuneSettings) -> Finetuned:
    from calib import processes, unfinished, writers

    writer = writers.open_writer(job.model)
    run = writers.run_description(settings, writer, training, dev)
    saving = job.saving
    with unfinished.keeping(job.output, run, resume=saving.resume, save_every=saving.save_every) as state:
        result = writers.finetune_writer(
            writer, training, dev, settings=settings, unfinished=state, progress=job.progress
        )
        processes.by_first(lambda: result.save(job.output))
    return result
