"""``transformers.Trainer`` for plugins: the distillation loss, batches of similar length, and nothing printed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from calib.arithmetic import uses_bf16
from calib.batches import Batch, LengthBuckets, collate_for
from calib.clock import Clock
from calib.losses import batch_loss, takes_part
from calib.progress import Progress
from calib.settings import FitSettings
from calib.students import Students
from compexport.errors import CompexportError, describe
from exporter.backbone import Backbone
from exporter.methods.variator import VariatorPlugins
from exporter.quiet import quiet_transformers

# Factors of the learning rate. The adapter's output side sees r small numbers, the other two hundreds of large ones.
W_IN, W_OUT, REST = 1.0, 6.0, 2.0
BETAS = (0.9, 0.98)


class PluginTrainer(Trainer):
    """``Trainer`` with the distillation loss summed over ratios, batches of similar length, and nothing printed."""

    def __init__(
        self,
        *args: Any,
        backbone: Backbone,
        clock: Clock,
        sampler: LengthBuckets,
        ratios: Sequence[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backbone, self.clock, self.sampler = backbone, clock, sampler
        self.ratios = ratios

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels", None)
        mask = inputs["attention_mask"]
        taught = [ratio for ratio in self.ratios if takes_part(ratio, min(self.ratios), self.state.global_step)]
        teacher, students = model(**inputs, ratios=taught)
        loss, share = self.clock.settings.loss, self.clock.share(self.state.global_step)
        losses = [batch_loss(self.backbone, teacher, one, mask, labels, loss, share) for one in students.values()]
        total = torch.stack(losses).sum()
        return (total, students) if return_outputs else total

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> LengthBuckets:
        return self.sampler


class _Watch(TrainerCallback):
    """Stops in time, reports progress, and refuses to go on with a loss that is no number."""

    def __init__(self, clock: Clock, progress: Progress, model: Students) -> None:
        self.clock, self.progress, self.model = clock, progress, model

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.clock.stepping = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        share = self.clock.share(state.global_step)
        self.progress("fit", round(share * self.clock.settings.steps), self.clock.settings.steps)
        if share >= 1.0:
            control.should_training_stop = True

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        if not all(bool(p.isfinite().all()) for p in self.model.plugins.parameters()):
            raise CompexportError(
                describe("fitting diverged", got="NaN in the plugins", hint="lower the learning rate")
            )


def run_trainer(
    backbone: Backbone,
    plugins: Mapping[int, VariatorPlugins],
    rows: list[dict[str, Any]],
    clock: Clock,
    progress: Progress,
) -> int:
    """Fit in place; returns the number of steps taken."""
    settings = clock.settings
    model = Students(backbone, plugins)
    optimizer = torch.optim.AdamW(_parameter_groups(plugins, settings), betas=BETAS, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, clock.learning_rate)
    sampler = LengthBuckets([len(row["input_ids"]) for row in rows], settings.batch_size, settings.seed)
    with quiet_transformers(), tempfile.TemporaryDirectory() as scratch:
        trainer = PluginTrainer(
            model=model,
            args=_arguments(scratch, settings),
            train_dataset=rows,
            data_collator=collate_for(backbone),
            optimizers=(optimizer, schedule),
            callbacks=[_Watch(clock, progress, model)],
            backbone=backbone,
            clock=clock,
            sampler=sampler,
            ratios=list(plugins),
        )
        _remove_printing(trainer)
        trainer.train()
        return int(trainer.state.global_step)


def _parameter_groups(plugins: Mapping[int, VariatorPlugins], settings: FitSettings) -> list[dict[str, Any]]:
    groups: dict[float, list[Tensor]] = {}
    for one in plugins.values():
        for name, parameter in one.named_parameters():
            factor = W_IN if name.endswith("w_in.weight") else W_OUT if name.endswith("w_out.weight") else REST
            groups.setdefault(factor, []).append(parameter)
    return [{"params": parameters, "lr": factor * settings.learning_rate} for factor, parameters in groups.items()]


def _arguments(scratch: str, settings: FitSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        max_grad_norm=1.0,
        seed=settings.seed,
        bf16=uses_bf16(settings),
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _remove_printing(trainer: Trainer) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
