"""``compexport train finetune``: teaching a model the labels of the data."""

from __future__ import annotations

from typing import Any

from compexport.training.job import Job, given, length


def train(job: Job) -> dict[str, Any]:
    """Fine-tune the model and write a Hugging Face folder.

    Where the data are a folder with dev.*, the accuracy there is measured.
    """
    from calib import finetune as tuning
    from calib import learners, processes, unfinished

    tuning.require_place(job.output, job.model)
    settings = tuning.FinetuneSettings(**length(job.fit), **given(job.fit)).checked()
    with processes.joined():
        job.require_resumable()
        training, dev = job.training_rows(), job.dev_rows()
        job.progress("loading the model")
        learner = learners.open_learner(job.model, training, job.fit.seed)
        run = tuning.run_description(settings, learner, training, dev)
        saving = job.saving
        with unfinished.keeping(job.output, run, resume=saving.resume, save_every=saving.save_every) as state:
            result = tuning.finetune(learner, training, dev, settings=settings, unfinished=state, progress=job.progress)
            processes.by_first(lambda: result.save(job.output))
    return {"output": str(job.output), **result.record}
