"""``compexport train modular``: modules that stand for spans of an encoder-decoder's layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from compexport.api import checked_ratios
from compexport.errors import InputError, describe
from compexport.training.job import Job, given, length

if TYPE_CHECKING:
    from calib.modular.settings import ModularSettings


def train(job: Job) -> dict[str, Any]:
    """Fine-tune the model where that is wanted, train the modules, and write it with them."""
    from calib import processes, unfinished
    from calib.modular.fit import DEFAULT_RATIOS, fit_modular, run_description
    from exporter.backbone import load_seq2seq

    settings = _settings(job)
    ratios = checked_ratios(DEFAULT_RATIOS if job.ratios is None else job.ratios)
    if settings.base_epochs:
        job.require_new_place("the model is to be fine-tuned first")
    else:
        job.require_checkpoint_place()
    with processes.joined():
        job.require_resumable()
        training, dev = job.training_rows(), job.dev_rows()
        job.progress("loading the model")
        start = load_seq2seq(job.model)
        run, saving = run_description(settings, start, ratios, training, dev), job.saving
        with unfinished.keeping(job.output, run, resume=saving.resume, save_every=saving.save_every) as state:
            result = fit_modular(
                start, training, dev, ratios, settings=settings, unfinished=state, progress=job.progress
            )
            processes.by_first(lambda: result.save(job.output))
    return {"output": str(job.output), **result.record}


def _settings(job: Job) -> ModularSettings:
    from calib.modular.settings import ModularSettings

    named = ("init", "base_epochs", "strategy")
    own = {name: getattr(job.modules, name) for name in named if getattr(job.modules, name) is not None}
    if job.modules.granularities is not None:
        own["granularities"] = tuple(_whole(size) for size in job.modules.granularities)
    return ModularSettings(**own, **length(job.fit), **given(job.fit)).checked()


def _whole(size: float) -> int:
    if size != int(size):
        raise InputError(describe("--granularities", got=f"{size:g}", expected="whole numbers of layers, like 2,3,6"))
    return int(size)
