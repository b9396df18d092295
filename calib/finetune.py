"""Plain fine-tuning of a classifier on labelled texts, so that the whole path starts from a pre-trained model."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calib import processes
from calib.arithmetic import moved, plain_attention, to_device
from calib.batches import Batch, Collate, Rows, batches_by_length, collate_for, tokenise
from calib.clock import WARM_UP_SHARE, Clock
from calib.data import Examples
from calib.labels import SHOWN, label_ids
from calib.learners import Learner
from calib.progress import Progress, silent
from calib.settings import TrainingSettings
from calib.trainer import LossOf, Training
from calib.unfinished import Unfinished
from compexport.errors import InputError, describe
from engines.atomic import staged_folder
from exporter.identity import label_words_sha256

RECORD = "finetune.json"
WEIGHT_DECAY = 0.01  # of matrices; biases and norms have none


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """How a model is fine-tuned."""

    learning_rate: float = 5e-5

    def checked(self) -> FinetuneSettings:
        """Itself, or InputError for a value that cannot be meant."""
        self.require_meant()
        return self

    def steps_for(self, rows: int) -> int:
        """How many steps that is on so many rows."""
        return self.steps or self.steps_of(self.epochs, rows)


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuned model, on the CPU in eval mode, and the ``train`` JSON document (without "output")."""

    learner: Learner
    record: dict[str, Any]
    settings: FinetuneSettings

    def save(self, folder: str | Path) -> None:
        """Write a Hugging Face folder, whole or not at all; an older one of ours is replaced.

        Raises InputError where something else is there.
        """
        made_from = {"sha256": self.learner.backbone.sha256, "folder": self.learner.backbone.folder.name}
        document = {"format": 1, "from": made_from, "settings": asdict(self.settings), "record": self.record}

        _require_ours(Path(folder))  # again: a long training lies between
        with staged_folder(Path(folder)) as staging:
            self.learner.write(staging)
            files = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
            text = json.dumps({**document, "files": files}, indent=2)
            (staging / RECORD).write_text(text + "\n", encoding="utf-8")


def require_place(output: Path, model: Path) -> None:
    """InputError where a fine-tuned model must not be written: over anything but an earlier one."""
    if output.resolve() == model.resolve():
        raise InputError(describe(f"{output}: is the model itself", expected="another folder"))
    _require_ours(output)


def _require_ours(output: Path) -> None:
    """InputError for a place that holds anything but what an earlier run wrote."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not (output / RECORD).is_file():
        raise InputError(describe(f"{output}: already there", expected=f"a new folder, or a model with {RECORD}"))
    if (output / "compexport.json").is_file():
        hint = "give another folder, or delete it"
        raise InputError(describe(f"{output}: plugins were fitted to the model that is there", hint=hint))
    ours = _files_of(output / RECORD)
    others = sorted({path.relative_to(output).as_posix() for path in output.rglob("*") if not _is_folder(path)} - ours)
    if others:
        got = ", ".join(others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        hint = "move them away, or give another folder"
        raise InputError(describe(f"{output}: holds more than a fine-tuned model", got=got, hint=hint))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _files_of(record: Path) -> set[str]:
    """What an earlier run wrote, as its record says."""
    try:
        return {RECORD, *map(str, json.loads(record.read_text(encoding="utf-8"))["files"])}
    except (OSError, ValueError, TypeError, KeyError) as error:
        got, hint = f"{type(error).__name__}: {error}", "give another folder"
        raise InputError(describe(f"{record}: does not say what was written", got=got, hint=hint)) from error


@dataclass(frozen=True)
class Subject:
    """What is learnt, and how it is told how well. ``tokenise``: a row per example, InputError without answers."""

    tokenise: Callable[[Examples], Rows]
    collate: Collate
    loss: LossOf
    metric: str
    measure: Callable[[Rows, Progress], float]


def finetune(
    learner: Learner,
    training: Examples,
    dev: Examples | None = None,
    *,
    settings: FinetuneSettings | None = None,
    unfinished: Unfinished | None = None,
    warm_up: float = WARM_UP_SHARE,
    progress: Progress = silent,
) -> Finetuned:
    """Fine-tune all of ``learner`` on ``training`` and measure its accuracy on ``dev``; the rest as ``taught``.

    Raises InputError for a label that the model does not have as well.
    """
    settings = settings or FinetuneSettings()

    def tokenise_labelled(examples: Examples) -> Rows:
        return tokenise(learner.backbone, examples, settings.max_length, _classes(examples, learner))

    collate = collate_for(learner.backbone)
    subject = Subject(
        tokenise=tokenise_labelled,
        collate=collate,
        loss=_cross_entropy,
        metric="accuracy",
        measure=partial(_share_right, learner, collate, settings.batch_size),
    )
    done = taught(
        learner, subject, training, dev, settings=settings, unfinished=unfinished, warm_up=warm_up, progress=progress
    )
    if dev is not None:  # what always giving the most common label reaches
        classes = _classes(dev, learner)
        done.record["majority"] = Counter(classes).most_common(1)[0][1] / len(classes)
    return done


def taught(
    learner: Learner,
    subject: Subject,
    training: Examples,
    dev: Examples | None,
    *,
    settings: FinetuneSettings,
    unfinished: Unfinished | None,
    warm_up: float,
    progress: Progress,
) -> Finetuned:
    """Fine-tune all of ``learner`` in ``subject`` on ``training``, and measure on ``dev`` what it knows.

    In several processes (``calib.processes``) all must call it alike. ``unfinished`` is where the run is saved, and
    from where it goes on; ``warm_up`` is the share of it in which the learning rate rises. Raises InputError for
    examples without answers or a setting out of range, CompexportError when numbers are no longer finite.
    """
    settings = settings.checked()
    clock = Clock(time.monotonic(), settings.steps_for(len(training)), settings.max_seconds, warm_up=warm_up)
    with torch.random.fork_rng(), plain_attention(learner.model), moved(learner):
        torch.manual_seed(settings.seed)
        progress("tokenise")
        rows = subject.tokenise(training)
        held_out = None if dev is None else subject.tokenise(dev)
        steps = Training(
            model=learner,
            groups=parameter_groups(learner, settings.learning_rate),
            loss=subject.loss,
            rows=rows,
            collate=subject.collate,
            clock=clock,
            batch_size=settings.batch_size,
            seed=settings.seed,
            precision=settings.precision,
            partial=learner.partial,
            unfinished=unfinished,
            progress=progress,
        ).run()
        learner.eval().requires_grad_(False)
        value = None
        if held_out is not None:
            value = processes.by_first(partial(subject.measure, held_out, progress))
    record = {
        "method": "finetune",
        "labels": learner.labels,
        "steps": steps,
        "epochs": round(steps * settings.batch_size / len(training), 3),
        "seconds": round(time.monotonic() - clock.started, 2),
        "metric": subject.metric,
        "value": value,
        "majority": None,
        "texts": len(training),
        "held_out": 0 if dev is None else len(dev),
    }
    return Finetuned(learner, record, settings)


def _classes(examples: Examples, learner: Learner) -> list[int]:
    if examples.labels is None:
        raise InputError(describe(f"{examples.origin}: no label column", expected="labels to learn and to measure by"))
    return label_ids(examples.labels, learner.labels, examples.origin, examples.label_names)


def _cross_entropy(model: nn.Module, batch: Batch, step: int) -> Tensor:
    labels = batch.pop("labels")
    return F.cross_entropy(model(**batch).float(), labels)


def parameter_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """All tensors, matrices with weight decay."""
    trained = [one for one in model.parameters() if one.requires_grad]
    matrices, rest = ([one for one in trained if (one.dim() > 1) is wide] for wide in (True, False))
    return [
        {"params": matrices, "lr": learning_rate, "weight_decay": WEIGHT_DECAY},
        {"params": rest, "lr": learning_rate, "weight_decay": 0.0},
    ]


def accuracy(learner: Learner, examples: Examples, wanted: Sequence[int], settings: FinetuneSettings) -> float:
    """The share of examples whose most likely class is the wanted one, in fp32."""
    rows = tokenise(learner.backbone, examples, settings.max_length, wanted)
    return _share_right(learner, collate_for(learner.backbone), settings.batch_size, rows)


@torch.no_grad()
def _share_right(learner: Learner, collate: Collate, size: int, rows: Rows, progress: Progress = silent) -> float:
    device = next(learner.parameters()).device
    right = done = 0
    for made in batches_by_length(rows, size, collate):
        progress("measure", done, len(rows))
        batch = to_device(made, device)
        truth = batch.pop("labels")
        right += int((learner(**batch).argmax(-1) == truth).sum())
        done += len(truth)
    return right / len(rows)


def run_description(settings: FinetuneSettings, learner: Learner, *examples: Examples | None) -> Mapping[str, Any]:
    """What must be the same for a run to go on where another stopped."""
    data = [one.sha256() for one in examples if one is not None]
    return {
        "command": "train finetune",
        "model": learner.backbone.sha256,
        "label_words": label_words_sha256(learner.backbone.folder),
        "labels": learner.labels,
        "data": data,
        **asdict(settings),
    }
