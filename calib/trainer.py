"""``transformers.Trainer`` with a loss and batches of ours: nothing printed, stopped in time, able to go on later.

Everything about the order of the batches follows from the seed and the step, so a resumed run takes the batches that an
uninterrupted one would have taken. The trained tensors are its parameters that require gradients.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from calib import processes
from calib.arithmetic import Precision, uses_bf16
from calib.batches import Batch, Collate, LengthBuckets, Rows
from calib.clock import Clock
from calib.progress import Progress, silent
from calib.unfinished import CLOCK, TENSORS, Unfinished, read_json, read_tensors, step_of
from compexport.errors import CompexportError, InputError, describe
from exporter.quiet import quiet_transformers

SAVE_SECONDS = 30.0  # of work, about, that a killed run loses
SAVE_SHARE = 0.05  # of the time, at most, that saving may take

# (model, batch, step) -> the loss of one batch
LossOf = Callable[[nn.Module, Batch, int], Tensor]


@dataclass(frozen=True)
class Training:
    """One training run: what is trained, on what, and how. ``groups``: parameter groups with their "lr"."""

    model: nn.Module
    groups: Sequence[dict[str, Any]]
    loss: LossOf
    rows: Rows
    collate: Collate
    clock: Clock
    batch_size: int
    seed: int
    precision: Precision
    betas: tuple[float, float] = (0.9, 0.999)
    # Whether some steps leave some of the trained tensors out.
    partial: bool = False
    unfinished: Unfinished | None = None
    progress: Progress = silent

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: one for name, one in self.model.named_parameters() if one.requires_grad}

    def run(self) -> int:
        """Train in place; the number of steps taken, those before an interruption included.

        Raises CompexportError when numbers are no longer finite, InputError for fewer texts in a batch than processes
        or a damaged checkpoint.
        """
        if self.batch_size < processes.count():
            expected = f"at least {processes.count()}, one text for each process"
            raise InputError(describe("batch size", got=self.batch_size, expected=expected))
        checkpoint = self.unfinished.latest() if self.unfinished is not None else None
        if checkpoint is not None:
            self.clock.go_on(read_json(checkpoint / CLOCK))
            if self.clock.share(step_of(checkpoint)) >= 1.0:  # only the result had not been written
                load_trained(checkpoint, self.trained())
                self.require_finite()
                return step_of(checkpoint)
        with quiet_transformers(), tempfile.TemporaryDirectory() as scratch:
            trainer = self.trainer(Path(scratch) if self.unfinished is None else self.unfinished.folder)
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
            self.require_finite()
            return int(trainer.state.global_step)

    def require_finite(self) -> None:
        """CompexportError where a trained tensor holds a number that is none."""
        if not all(bool(one.isfinite().all()) for one in self.trained().values()):
            raise CompexportError(
                describe("training diverged", got="NaN in the trained tensors", hint="lower the learning rate")
            )

    def trainer(self, folder: Path) -> StepTrainer:
        """The trainer, its checkpoints in ``folder``."""
        from transformers.trainer_callback import PrinterCallback

        optimizer = torch.optim.AdamW(self.groups, betas=self.betas, weight_decay=0.0)
        trainer = StepTrainer(
            model=self.model,
            args=self.arguments(folder),
            train_dataset=self.rows,
            data_collator=self.collate,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self.clock.learning_rate)),
            callbacks=[Watch(self)],
            training=self,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def arguments(self, folder: Path) -> TrainingArguments:
        """Its arguments: everything that could print, report or save by itself is off."""
        arguments = TrainingArguments(
            output_dir=str(folder),
            max_steps=self.clock.steps,
            per_device_train_batch_size=max(1, self.batch_size // processes.count()),
            max_grad_norm=1.0,
            seed=self.seed,
            bf16=uses_bf16(self.precision),
            use_cpu=not torch.cuda.is_available(),
            ddp_find_unused_parameters=self.partial,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            save_strategy="no",  # the callback says when
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        # One process, one device: further GPUs are for further processes, not for threads that split every batch.
        arguments._n_gpu = min(arguments.n_gpu, 1)
        return arguments


class StepTrainer(Trainer):
    """``Trainer`` with the batches, the loss and the saved tensors of a ``Training``."""

    def __init__(self, *args: Any, training: Training, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.training = training

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss = self.training.loss(model, inputs, self.state.global_step)
        return (loss, {}) if return_outputs else loss

    def get_train_dataloader(self) -> DataLoader:
        """All batches of the run in one pass; not Trainer's own, which would deal out whole batches to processes."""
        training = self.training
        lengths = [len(row["input_ids"]) for row in training.rows]
        share = (processes.rank(), processes.count())
        batches = LengthBuckets(lengths, training.batch_size, training.seed, training.clock.steps, share)
        return DataLoader(training.rows, batch_sampler=batches, collate_fn=training.collate)  # type: ignore[arg-type]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        from safetensors.torch import save_file

        if output_dir is None or not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {name: one.detach().contiguous() for name, one in self.training.trained().items()}
        save_file(tensors, Path(output_dir) / TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(Path(resume_from_checkpoint), self.training.trained())


@torch.no_grad()
def load_trained(checkpoint: Path, trained: Mapping[str, nn.Parameter]) -> None:
    """Overwrite the trained tensors with those of a checkpoint; InputError when they are not these."""
    path = checkpoint / TENSORS
    tensors = read_tensors(path)
    if tensors.keys() != trained.keys():
        raise InputError(describe(f"{path}: other tensors than are trained", hint="delete its folder to start anew"))
    for name, tensor in tensors.items():
        trained[name].copy_(tensor)


@dataclass
class Watch(TrainerCallback):
    """Stops in time, saves now and then, reports progress, and refuses to go on with numbers that are none."""

    training: Training
    saved_at: float = field(default=0.0)
    saving: float = field(default=0.0)
    save_s: float = field(default=0.0)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.training.clock.begin_steps()
        self.saved_at = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        clock = self.training.clock
        share = clock.share(state.global_step)
        self.training.progress("fit", round(share * clock.steps), clock.steps)
        control.should_training_stop = control.should_training_stop or share >= 1.0
        control.should_save = self._due(state.global_step, share)
        if control.should_save:  # whatever is saved, a later process goes on from it
            self.training.require_finite()
        self.saving = time.monotonic()

    def _due(self, step: int, share: float) -> bool:
        unfinished = self.training.unfinished
        if unfinished is None:
            return False
        if share >= 1.0 or (unfinished.save_every is not None and step % unfinished.save_every == 0):
            return True
        pause = max(SAVE_SECONDS, self.save_s / SAVE_SHARE)
        return processes.agreed(float(time.monotonic() - self.saved_at >= pause)) > 0

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        unfinished = self.training.unfinished
        assert unfinished is not None
        processes.wait()  # every process writes its random numbers
        if processes.rank() == 0:
            unfinished.complete(unfinished.folder / f"checkpoint-{state.global_step}", self.training.clock.record())
        self.saved_at = time.monotonic()
        self.save_s = self.saved_at - self.saving
