"""Training modules for an encoder-decoder in one run: model folder and pairs of texts in, method checkpoint out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib import processes
from calib.arithmetic import moved
from calib.batches import Batch, Rows
from calib.clock import Clock
from calib.data import Examples
from calib.finetune import FinetuneSettings, parameter_groups
from calib.fit import with_held_out
from calib.modular.lesson import Lesson
from calib.modular.losses import modular_loss
from calib.modular.schedule import replacing_probability
from calib.modular.settings import ModularSettings
from calib.progress import Progress, silent
from calib.sequences import tokenise_pairs
from calib.trainer import Training
from calib.unfinished import Unfinished
from calib.writers import METRIC, Writer, collate_pairs, finetune_writer, token_accuracy
from compexport.errors import CompexportError, describe
from exporter.backbone import Seq2Seq, load_seq2seq
from exporter.checkpoint import MethodCheckpoint
from exporter.methods.assembly import STACKS, Assembly, ModularFacts, assembly_for_ratio, spans
from exporter.methods.modular import ModularModel
from exporter.methods.modular_checkpoint import save_modular

DEFAULT_RATIOS = (1.5, 2, 3, 6)


@dataclass(frozen=True)
class ModularResult:
    """The modules, on the CPU, the assemblies that were measured, and the ``train`` JSON document (without "output").

    The base lies in the unfinished run where it was fine-tuned there: save before that is gone.
    """

    modular: ModularModel
    assemblies: dict[str, Assembly]
    record: dict[str, Any]
    settings: ModularSettings

    def save(self, folder: str | Path) -> MethodCheckpoint:
        """Write the method checkpoint; errors as ``exporter.checkpoint.save_checkpoint``."""
        names = ("metric", "teacher", "student", "strategy", "steps", "seconds", "texts", "held_out", "finetuned")
        training = {**{name: self.record[name] for name in names}, "settings": asdict(self.settings)}
        return save_modular(folder, self.modular, training=training, assemblies=self.assemblies)


def named_assemblies(facts: ModularFacts, ratios: Sequence[float], settings: ModularSettings) -> dict[str, Assembly]:
    """By ratio, as text; InputError for a ratio that the base's layers cannot have."""
    return {f"{ratio:g}": assembly_for_ratio(facts, ratio, settings.strategy) for ratio in sorted(set(ratios))}


def fit_modular(
    start: Seq2Seq,
    training: Examples,
    dev: Examples | None,
    ratios: Sequence[float] = DEFAULT_RATIOS,
    *,
    settings: ModularSettings,
    unfinished: Unfinished | None = None,
    progress: Progress = silent,
) -> ModularResult:
    """Train every module of ``start`` on pairs of texts, and measure the assemblies of ``ratios`` on ``dev``.

    With ``settings.base_epochs`` the model is fine-tuned first, in a copy. Without ``dev``, one pair in ten (at most
    256) is kept back. The folder of ``start`` is not changed. In several processes (``calib.processes``) all must call
    it alike. Raises InputError for data without targets, granularities or ratios that do not fit the layers;
    CompexportError when numbers are no longer finite.
    """
    settings = settings.checked()
    began = time.monotonic()
    training, dev = with_held_out(training, dev)
    # Wrong granularities and ratios are found before anything is trained.
    assemblies = named_assemblies(ModularModel(start, settings.granularities).facts, ratios, settings)
    base, tuned = start, None
    if settings.base_epochs:
        base, tuned = _tuned(start, training, dev, settings, unfinished, progress)
    modular = ModularModel(base, settings.granularities, settings.init)
    steps, quality = _teach(modular, assemblies, training, dev, settings, unfinished, progress)
    record = {
        "method": "modular",
        "ratios": [float(ratio) for ratio in assemblies],
        "strategy": settings.strategy,
        "assemblies": {ratio: one.document() for ratio, one in assemblies.items()},
        "granularities": {name: list(modular.facts.stack(name).granularities) for name in STACKS},
        **_sizes(modular, assemblies, base),
        "steps": steps,
        "seconds": round(time.monotonic() - began, 2),
        **quality,
        "texts": len(training),
        "held_out": len(dev),
        "finetuned": tuned,
    }
    return ModularResult(modular, assemblies, record, settings)


def _tuned(
    start: Seq2Seq,
    training: Examples,
    dev: Examples,
    settings: ModularSettings,
    unfinished: Unfinished | None,
    progress: Progress,
) -> tuple[Seq2Seq, dict[str, Any]]:
    """The base, taught the task, and its record; where a run that goes on has done so, from there."""
    if unfinished is None:
        raise CompexportError(describe("base_epochs", got=settings.base_epochs, expected="a run that is kept"))
    part, folder = unfinished.part("base"), unfinished.backbone
    record = part.finished()
    if record is None:
        steps = settings.base_steps_for(len(training))
        share = steps / (steps + settings.steps_for(len(training)))
        tuning = FinetuneSettings(
            steps=steps,
            batch_size=settings.batch_size,
            max_length=settings.max_length,
            learning_rate=settings.learning_rate,
            seed=settings.seed,
            max_seconds=None if settings.max_seconds is None else settings.max_seconds * share,
            precision=settings.precision,
        )
        done = finetune_writer(
            Writer(start), training, dev, settings=tuning, unfinished=part, progress=_prefixed(progress, "base")
        )
        processes.by_first(lambda: done.save(folder))
        made = {name: done.record[name] for name in ("steps", "epochs", "seconds", "value")}
        processes.by_first(lambda: part.finish(made))
        record = made
    return load_seq2seq(folder), record


def _teach(
    modular: ModularModel,
    assemblies: Mapping[str, Assembly],
    training: Examples,
    dev: Examples,
    settings: ModularSettings,
    unfinished: Unfinished | None,
    progress: Progress,
) -> tuple[int, dict[str, Any]]:
    """Train the modules in place; the number of steps, and what the base and its assemblies are worth."""
    seconds = settings.max_seconds
    if seconds is not None and settings.base_epochs:
        steps = settings.steps_for(len(training))
        seconds *= steps / (steps + settings.base_steps_for(len(training)))
    clock = Clock(time.monotonic(), settings.steps_for(len(training)), seconds)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        lesson = Lesson(modular)
        progress("tokenise")
        rows, measured = (tokenise_pairs(modular.source, one, settings.max_length) for one in (training, dev))
        with moved(lesson):
            steps = _training(lesson, rows, clock, settings, unfinished, progress).run()
            lesson.eval()
            modular.requires_grad_(False)
            return steps, _quality(modular, assemblies, measured, settings, progress)


def _training(
    lesson: Lesson,
    rows: Rows,
    clock: Clock,
    settings: ModularSettings,
    unfinished: Unfinished | None,
    progress: Progress,
) -> Training:
    def loss(model: nn.Module, batch: Batch, step: int) -> Tensor:
        labels, source = batch["labels"], batch["attention_mask"]
        assembly = lesson.draw(replacing_probability(clock.share(step)), settings.seed, step)
        ours, theirs = model(assembly, **batch)
        total = modular_loss(ours, theirs, assembly, source, labels)
        # Early on, now and then no module is drawn at all.
        return total if total.requires_grad else total + 0.0 * next(lesson.modular.module_parameters()).sum()

    return Training(
        model=lesson,
        groups=parameter_groups(lesson, settings.learning_rate),
        loss=loss,
        rows=rows,
        collate=collate_pairs(lesson.modular.source),
        clock=clock,
        batch_size=settings.batch_size,
        seed=settings.seed,
        precision=settings.precision,
        partial=True,
        unfinished=None if unfinished is None else unfinished.part("modules"),
        progress=_prefixed(progress, "modules"),
    )


def _quality(
    modular: ModularModel,
    assemblies: Mapping[str, Assembly],
    rows: Rows,
    settings: ModularSettings,
    progress: Progress,
) -> dict[str, Any]:
    def measured(assembly: Assembly, name: str) -> float:
        model, collate, report = modular.assemble(assembly), collate_pairs(modular.source), _prefixed(progress, name)
        return processes.by_first(lambda: token_accuracy(model, rows, collate, settings.batch_size, report))

    return {
        "metric": METRIC,
        "teacher": measured(Assembly.base(modular.facts), "base"),
        "student": {ratio: measured(one, f"ratio {ratio}") for ratio, one in assemblies.items()},
    }


def _sizes(modular: ModularModel, assemblies: Mapping[str, Assembly], base: Seq2Seq) -> dict[str, Any]:
    """Parameters of each assembly's modules, and of all that there are."""

    def modules_of(assembly: Assembly) -> int:
        tiles = [
            modular.tile(name, start, size)
            for name in STACKS
            for start, size in spans(assembly.stack(name))
            if size > 1
        ]
        return sum(one.numel() for tile in tiles for one in tile.parameters())

    counts = {ratio: modules_of(one) for ratio, one in assemblies.items()}
    every = sum(one.numel() for one in modular.module_parameters())
    return {
        "extra_params": counts,
        "extra_params_share": {ratio: count / base.params for ratio, count in counts.items()},
        "module_params": every,
        "module_params_share": every / base.params,
    }


def _prefixed(progress: Progress, name: str) -> Progress:
    def report(message: str, done: float | None = None, total: float | None = None) -> None:
        progress(f"{name}: {message}", done, total)

    return report


def run_description(
    settings: ModularSettings, start: Seq2Seq, ratios: Sequence[float], *examples: Examples | None
) -> Mapping[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    return {
        "command": "train modular",
        "model": start.sha256,
        "data": [one.sha256() for one in examples if one is not None],
        "ratios": sorted(set(ratios)),
        **asdict(settings),
    }


__all__ = ["DEFAULT_RATIOS", "ModularResult", "fit_modular", "named_assemblies", "run_description"]
