"""Training modules as a whole: what changes, what is kept, and going on after an interruption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from calib.finetune import FinetuneSettings
from calib.modular.fit import fit_modular, run_description
from calib.modular.lesson import Lesson
from calib.modular.schedule import replacing_probability
from calib.modular.settings import ModularSettings
from calib.unfinished import Unfinished
from calib.writers import finetune_writer, open_writer, write
from compexport.errors import InputError
from exporter.backbone import load_seq2seq
from exporter.methods.assembly import STACKS, spans
from exporter.methods.modular import ModularModel
from exporter.methods.modular_checkpoint import load_modular
from tests.calib.modular.conftest import examples

Folder = Callable[[str], Path]
SETTINGS = ModularSettings(steps=8, batch_size=4, learning_rate=1e-2, precision="fp32")

pytestmark = pytest.mark.usefixtures("one_thread")


def test_modules_learn_and_the_base_stays(folder: Folder, tmp_path: Path) -> None:
    start, dev = load_seq2seq(folder("t5")), examples(8, seed=1)
    before = {name: one.clone() for name, one in start.model.state_dict().items()}
    result = fit_modular(start, examples(30), dev, (1.5, 3, 6), settings=SETTINGS)
    assert all(torch.equal(before[name], one) for name, one in start.model.state_dict().items())
    record = result.record
    assert record["steps"] == 8 and record["finetuned"] is None and record["ratios"] == [1.5, 3.0, 6.0]
    assert record["assemblies"]["6"] == {"encoder": [6], "decoder": [6]}
    assert record["extra_params"]["6"] < record["extra_params"]["3"] < record["module_params"]
    assert record["student"].keys() == {"1.5", "3", "6"} and 0.0 <= record["teacher"] <= 1.0
    result.save(tmp_path / "out")
    found = load_modular(tmp_path / "out")
    fresh = fit_modular(start, examples(30), dev, (6,), settings=replace(SETTINGS, steps=1, learning_rate=1e-9))
    stored, started = found.module_tensors(), fresh.modular.module_tensors()
    changed = set()
    for name, one in result.modular.module_tensors().items():
        assert torch.equal(stored[name], one)
        if float((one - started[name]).abs().max()) > 1e-4:
            changed.add(name.rpartition(".layer.")[0])
    assert changed == drawn_modules(result.modular, SETTINGS)


def drawn_modules(modular: ModularModel, settings: ModularSettings) -> set[str]:
    """Names of those that some step draws."""
    lesson, steps = Lesson(modular), settings.steps_for(0)
    drawn = [lesson.draw(replacing_probability(step / steps), settings.seed, step) for step in range(steps)]
    return {
        f"modules.{name}.g{size}.{start // size}"
        for assembly in drawn
        for name in STACKS
        for start, size in spans(assembly.stack(name))
        if size > 1
    }


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not(folder: Folder, tmp_path: Path) -> None:
    """In the fine-tuning of the base, and in the training of the modules."""
    settings = replace(SETTINGS, base_epochs=0.5)

    def run(place: Path, stop: str = "") -> dict[str, torch.Tensor]:
        def report(message: str, done: float | None = None, total: float | None = None) -> None:
            if message == stop and done == 3:
                raise KeyboardInterrupt

        unfinished = Unfinished(place, save_every=2)
        # What one run does to its start must not reach the next.
        start = load_seq2seq(folder("mbart"))
        data = examples(30), examples(8, seed=1)
        result = fit_modular(start, *data, (6,), settings=settings, unfinished=unfinished, progress=report)
        return result.modular.module_tensors()

    whole = run(tmp_path / "whole")
    for stop in ("base: fit", "modules: fit"):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "stopped", stop)
    for name, one in run(tmp_path / "stopped").items():
        assert torch.equal(one, whole[name]), name
    start = load_seq2seq(folder("mbart"))
    assert run_description(settings, start, (6, 2)) == run_description(settings, start, (2, 6))


def test_a_writer_learns_and_writes(folder: Folder) -> None:
    writer = open_writer(folder("t5"))
    data = examples(60)
    settings = FinetuneSettings(steps=60, batch_size=16, learning_rate=1e-2, precision="fp32")
    record = finetune_writer(writer, data, examples(20, seed=1), settings=settings).record
    assert record["metric"] == "token_accuracy" and record["value"] > 0.5
    source = load_seq2seq(folder("t5"))
    written = write(writer.model, source, data.texts[:6], size=4, max_new_tokens=8)
    assert len(written) == 6 and all(set(text.split()) <= {"AH0", "B", "K", "OW1", "T"} for text in written)
    # One at a time, and as the tokens say: neither order nor padding changes what is written.
    assert [write(writer.model, source, [text], size=1, max_new_tokens=8)[0] for text in data.texts[:6]] == written


def test_what_does_not_fit_is_refused(folder: Folder) -> None:
    start, data = load_seq2seq(folder("t5")), examples(12)
    with pytest.raises(InputError, match="ratio: got 7, expected at most 6"):
        fit_modular(start, data, None, (7,), settings=SETTINGS)
    with pytest.raises(InputError, match="too few layers for modules"):
        fit_modular(start, data, None, settings=replace(SETTINGS, granularities=(5,)))
    with pytest.raises(InputError, match="no target column"):
        fit_modular(start, replace(data, targets=None), None, settings=SETTINGS)
    with pytest.raises(InputError, match="init: got 'middle', expected first or last"):
        replace(SETTINGS, init="middle").checked()  # type: ignore[arg-type]
