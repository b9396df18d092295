"""Fitting Variator plugins: the backbone teaches itself. Only plugin tensors get gradients, no labels are needed.

Every batch runs once through the backbone and once through each ratio. Mixers start from data; adapters
start small and random or, on request, from a regression (``calib.closed_form``). Then ``transformers.Trainer`` fits all
ratios together.
Letters: B batch, S sequence length, H hidden size, C classes.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from calib.closed_form import initialise
from calib.data import Examples
from calib.labels import label_ids
from compexport.errors import CompexportError, InputError, describe
from exporter.backbone import Backbone
from exporter.checkpoint import MethodCheckpoint, save_checkpoint
from exporter.methods.variator import PadMode, VariatorEncoder, VariatorPlugins, default_width, pool, task_outputs
from exporter.quiet import quiet_transformers

Loss = Literal["hidden", "task", "task-hidden"]
LOSSES = ("hidden", "task", "task-hidden")
Batch = dict[str, Tensor]

# Factors of the learning rate. The adapter's output side sees r small numbers, the other two hundreds of large ones.
W_IN, W_OUT, REST = 0.5, 3.0, 1.0
WARM_UP_SHARE = 0.05
BETAS = (0.9, 0.98)
# What a ratio gains by a step falls with the ratio: fewer of its errors can be mended by so few parameters. Time that
# the large ones leave goes to the small ones.
STEPS_SHARE = 2.0
# Of the hidden-state error, in units of the teacher's variance, beside the output error; adapters that start at random
# need more of its guidance.
HIDDEN_WEIGHT, HIDDEN_WEIGHT_RANDOM_START = 0.3, 1.0
INITIAL_SHARE = 0.2  # of max_seconds, about the most that the closed form may take
# Regressed adapters help only from here on. They are off by default: their output weights grow large, and then a graph
# may differ from PyTorch by more than the parity gate allows.
REGRESSED_FROM = 4
RANDOM_START = 2.0  # factor of the learning rate of those that start at random, and have farther to go
INITIAL_TOKENS_PER_CHANNEL = 26
HELD_OUT = 256  # texts, at most, kept from training to measure the result when none are given
MEASURED = 256  # held-out texts, at most, that are measured
BUCKETED_BATCHES = 8  # texts of this many batches are sorted by length together


class Progress(Protocol):
    """How long work reports itself: the stage, and how far it is when that is known."""

    def __call__(self, message: str, done: float | None = None, total: float | None = None) -> None: ...


def _silent(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""


@dataclass(frozen=True)
class FitSettings:
    """How plugins are fitted. ``max_length`` in tokens; ``learning_rate`` is the peak.

    ``max_seconds`` ends the fit early, whatever ``steps`` says, with the learning rate brought down in time; a run
    that it ends depends on the machine's speed, one that ``steps`` ends is repeated by its ``seed``. ``widths`` gives
    adapter widths by ratio; by default a ratio's plugins add at most 1 % to the backbone. ``bf16`` None: where the
    processor multiplies it natively. ``closed_form``: start the adapters of ratios from 4 on by regression.
    """

    steps: int = 600
    batch_size: int = 16
    max_length: int = 48
    learning_rate: float = 1.5e-3
    seed: int = 0
    loss: Loss = "hidden"
    widths: Mapping[int, int] | None = None
    pad: PadMode = "masked"
    max_seconds: float | None = None
    closed_form: bool = False
    bf16: bool | None = None

    def regresses(self, ratio: int) -> bool:
        """Whether the adapters of a ratio start from the closed form."""
        return self.closed_form and ratio >= REGRESSED_FROM

    def checked(self) -> FitSettings:
        """Itself, or InputError for a value that cannot be meant."""
        for name in ("steps", "batch_size", "learning_rate"):
            if not getattr(self, name) > 0:
                raise InputError(describe(name, got=getattr(self, name), expected="more than 0"))
        if self.max_length < 4:
            raise InputError(describe("max_length", got=self.max_length, expected="at least 4 tokens"))
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise InputError(describe("max_seconds", got=self.max_seconds, expected="more than 0"))
        if self.loss not in LOSSES:
            raise InputError(describe("unknown loss", got=repr(self.loss), expected=" or ".join(LOSSES)))
        return self


@dataclass(frozen=True)
class FitResult:
    """Fitted plugins by ratio, in eval mode, and the ``train`` JSON document (without "output")."""

    plugins: dict[int, VariatorPlugins]
    record: dict[str, Any]
    settings: FitSettings

    def checkpoint_settings(self) -> dict[str, Any]:
        """What ``compexport.json`` keeps: all that is needed to use the plugins, and how they were made."""
        return {
            "pad": self.settings.pad,
            "activation": "tanh",
            "widths": {str(ratio): plugins.width for ratio, plugins in self.plugins.items()},
            "training": {**self.record, "settings": {**asdict(self.settings), "widths": None}},
        }

    def save(self, folder: str | Path, backbone: Backbone) -> MethodCheckpoint:
        """Write the method checkpoint; errors as ``exporter.checkpoint.save_checkpoint``."""
        tensors = {ratio: dict(plugins.state_dict()) for ratio, plugins in self.plugins.items()}
        return save_checkpoint(folder, backbone.folder, "variator", self.checkpoint_settings(), tensors)


def fit_variator(
    backbone: Backbone,
    texts: Examples | Sequence[str],
    ratios: Sequence[int],
    *,
    held_out: Examples | Sequence[str] | None = None,
    settings: FitSettings | None = None,
    progress: Progress = _silent,
) -> FitResult:
    """Fit plugins for all ``ratios`` together on ``texts``, and measure them on ``held_out`` texts.

    Without ``held_out``, one text in ten (at most 256) is kept back. The metric is "cosine" (mean cosine with the
    backbone's embedding) for feature extraction, "accuracy" for sequence classification with labels, else
    "agreement" with the backbone's own answer. The backbone is not changed.

    Raises InputError for no texts, a ratio below 2, a setting out of range, or a task loss without usable labels;
    CompexportError when the loss is no longer finite.
    """
    started = time.monotonic()
    settings = (settings or FitSettings()).checked()
    training, measured = _split(_as_examples(texts), None if held_out is None else _as_examples(held_out))
    if not ratios or min(ratios) < 2:
        raise InputError(describe("ratios to fit", got=list(ratios), expected="whole numbers of 2 or more"))
    label_ids = _label_ids(backbone, training, settings.loss)
    with torch.random.fork_rng(), _plain_attention(backbone):
        torch.manual_seed(settings.seed)
        progress("tokenise")
        rows = tokenise(backbone, training, settings.max_length, label_ids)
        plugins = {ratio: _fresh(backbone, ratio, settings) for ratio in ratios}
        clock = Clock(started, settings)
        _initialise(backbone, plugins, rows, clock, progress)
        steps = _run_trainer(backbone, plugins, rows, clock, progress)
    progress("measure")
    result = {ratio: one.eval().requires_grad_(False) for ratio, one in plugins.items()}
    metric, teacher, student = measure(backbone, result, measured, settings)
    extra = {str(ratio): one.params for ratio, one in result.items()}
    record = {
        "method": "variator",
        "ratios": sorted(result),
        "extra_params": extra,
        "extra_params_share": {ratio: count / backbone.params for ratio, count in extra.items()},
        "steps": steps,
        "seconds": round(time.monotonic() - started, 2),
        "metric": metric,
        "teacher": teacher,
        "student": {str(ratio): value for ratio, value in student.items()},
        "texts": len(training),
        "held_out": min(len(measured), MEASURED),
    }
    return FitResult(result, record, settings)


@contextmanager
def _plain_attention(backbone: Backbone) -> Iterator[None]:
    """Plain MatMul and Softmax on CPU: the backward pass of its fused attention takes longer than all else together."""
    before = backbone.model.config._attn_implementation
    if torch.cuda.is_available() or before == "eager":
        yield
        return
    backbone.model.set_attn_implementation("eager")
    try:
        yield
    finally:
        backbone.model.set_attn_implementation(before)


def _as_examples(texts: Examples | Sequence[str]) -> Examples:
    examples = texts if isinstance(texts, Examples) else Examples(list(texts))
    if not len(examples):
        raise InputError(describe("no texts to fit on", expected="at least one"))
    return examples


def _split(training: Examples, held_out: Examples | None) -> tuple[Examples, Examples]:
    """Keep texts back for measuring where none are given; fewer than ten are used for both."""
    if held_out is not None:
        return training, held_out
    if len(training) < 10:
        return training, training
    every = max(10, len(training) // HELD_OUT)
    kept = [index for index in range(len(training)) if index % every == 0]
    rest = [index for index in range(len(training)) if index % every]
    return training.take(rest), training.take(kept)


def _fresh(backbone: Backbone, ratio: int, settings: FitSettings) -> VariatorPlugins:
    width = (settings.widths or {}).get(ratio) or default_width(backbone, ratio)
    return VariatorPlugins(backbone.hidden_size, backbone.num_layers, ratio, width, settings.pad)


def _label_ids(backbone: Backbone, examples: Examples, loss: Loss) -> list[int] | None:
    """Class numbers for a task loss; None when the loss needs none."""
    if loss == "hidden":
        return None
    if backbone.task != "sequence-classification":
        raise InputError(
            describe(f"loss {loss}", got=backbone.task, expected="sequence-classification", hint='use loss "hidden"')
        )
    if examples.labels is None:
        raise InputError(
            describe(f"loss {loss} needs labels", got="none", hint='name the column, or use loss "hidden"')
        )
    return label_ids(examples.labels, backbone.labels, examples.origin)


# --- batches -------------------------------------------------------------------------------------------------------


def tokenise(
    backbone: Backbone, examples: Examples, max_length: int, labels: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """One row of token ids per text or pair, cut at ``max_length`` tokens, unpadded."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(backbone.tokenizer_json)
    tokenizer.no_padding()
    tokenizer.enable_truncation(min(max_length, backbone.max_length))
    rows = []
    for index, encoding in enumerate(tokenizer.encode_batch(examples.inputs)):
        row: dict[str, Any] = {"input_ids": encoding.ids}
        if "token_type_ids" in backbone.input_names:
            row["token_type_ids"] = encoding.type_ids
        if labels is not None:
            row["labels"] = labels[index]
        rows.append(row)
    return rows


@dataclass(frozen=True)
class Collate:
    """Rows -> tensors [B,S], padded on the right to the longest; ``labels`` [B]."""

    pad_id: int

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Batch:
        longest = max(len(row["input_ids"]) for row in rows)
        batch = {"attention_mask": torch.zeros(len(rows), longest, dtype=torch.long)}
        for name in rows[0]:
            if name == "labels":
                batch[name] = torch.tensor([row[name] for row in rows])
                continue
            batch[name] = torch.full((len(rows), longest), self.pad_id if name == "input_ids" else 0)
            for number, row in enumerate(rows):
                batch[name][number, : len(row[name])] = torch.tensor(row[name])
        for number, row in enumerate(rows):
            batch["attention_mask"][number, : len(row["input_ids"])] = 1
        return batch


class LengthBuckets(Sampler[int]):
    """Random order in which every batch holds texts of similar length, so that little of it is padding."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size = lengths, batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(len(self.lengths), generator=self.generator).tolist()
        size = self.batch_size * BUCKETED_BATCHES
        for start in range(0, len(order), size):
            bucket = sorted(order[start : start + size], key=self.lengths.__getitem__)
            batches = [bucket[i : i + self.batch_size] for i in range(0, len(bucket), self.batch_size)]
            # Only a whole batch may move, or the batches after a short one would be cut elsewhere.
            whole = [batch for batch in batches if len(batch) == self.batch_size]
            for index in torch.randperm(len(whole), generator=self.generator).tolist():
                yield from whole[index]
            for batch in batches:
                if len(batch) < self.batch_size:
                    yield from batch


def _collate(backbone: Backbone) -> Collate:
    return Collate(int(backbone.config.pad_token_id or 0))


def _batches(rows: Sequence[Mapping[str, Any]], size: int, collate: Collate) -> list[Batch]:
    """All rows by length, ``size`` at a time."""
    ordered = sorted(rows, key=lambda row: len(row["input_ids"]))
    return [collate(ordered[start : start + size]) for start in range(0, len(ordered), size)]


# --- the clock -----------------------------------------------------------------------------------------------------


@dataclass
class Clock:
    """How much of a fit is done, by steps or by seconds, whichever is further."""

    started: float
    settings: FitSettings
    stepping: float | None = field(default=None)  # when the first step began

    def share(self, step: int) -> float:
        """0 at the first step, 1 when ``steps`` or ``max_seconds`` are used up."""
        share = step / self.settings.steps
        if self.settings.max_seconds is not None:
            now = time.monotonic()
            begun = self.stepping if self.stepping is not None else now
            # However long the start took (a busy machine), half of the time is for steps: few steps are worth nothing.
            left = max(self.settings.max_seconds - (begun - self.started), self.settings.max_seconds / 2)
            share = max(share, (now - begun) / left)
        return min(share, 1.0)

    def learning_rate(self, step: int) -> float:
        """The factor of the peak learning rate: a short rise, then a straight line down to 0."""
        share = self.share(step)
        # Never 0 at the first step, which would be wasted.
        return min(1.0, (share + 1 / self.settings.steps) / WARM_UP_SHARE) * (1.0 - share)


# --- the starting point --------------------------------------------------------------------------------------------


def _initialise(
    backbone: Backbone,
    plugins: Mapping[int, VariatorPlugins],
    rows: Sequence[Mapping[str, Any]],
    clock: Clock,
    progress: Progress,
) -> None:
    regressed = [ratio for ratio in plugins if clock.settings.regresses(ratio)]
    wanted = INITIAL_TOKENS_PER_CHANNEL * 2 * backbone.hidden_size
    sample, tokens = [], 0
    for index in torch.randperm(len(rows)).tolist():
        sample.append(rows[index])
        tokens += len(rows[index]["input_ids"])
        if tokens >= wanted:
            break
    batches = _batches(sample, 2 * clock.settings.batch_size, _collate(backbone))
    with _autocast(clock.settings):
        batches = _affordable(backbone, plugins, batches, clock.settings)
        layers = backbone.num_layers
        progress("closed-form start", 0, layers)
        initialise(
            backbone,
            plugins,
            batches,
            regressed=regressed,
            after_layer=lambda i: progress("closed-form start", i + 1, layers),
        )


@torch.no_grad()
def _affordable(
    backbone: Backbone, plugins: Mapping[int, VariatorPlugins], batches: list[Batch], settings: FitSettings
) -> list[Batch]:
    """Batches, spread over all lengths, that take about ``INITIAL_SHARE`` of ``max_seconds``; at least two."""
    if settings.max_seconds is None or len(batches) <= 2:
        return batches
    middle = batches[len(batches) // 2]
    model = Students(backbone, plugins)
    model(**middle)  # the first run is slower
    begun = time.monotonic()
    model(**middle)
    # The regressions take about as long as the runs.
    fitting = int(INITIAL_SHARE * settings.max_seconds / (2 * (time.monotonic() - begun)))
    step = -(-len(batches) // max(fitting, 2))
    return batches[step // 2 :: step]


def _bf16(settings: FitSettings) -> bool:
    if settings.bf16 is not None:
        return settings.bf16
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    # Emulated bf16 is slower than fp32.
    return "avx512_bf16" in _cpu_flags() or "amx_bf16" in _cpu_flags()


def _cpu_flags() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0]
    except OSError:
        return ""


def _autocast(settings: FitSettings) -> Any:
    return torch.autocast("cpu", torch.bfloat16) if _bf16(settings) else nullcontext()


# --- the loss ------------------------------------------------------------------------------------------------------


class Students(nn.Module):
    """The backbone and one student per ratio, which share all of it but their plugins."""

    def __init__(self, backbone: Backbone, plugins: Mapping[int, VariatorPlugins]) -> None:
        super().__init__()
        self.teacher = VariatorEncoder(backbone)
        self.plugins = nn.ModuleDict({str(ratio): one for ratio, one in plugins.items()})
        self._students: dict[int, VariatorEncoder] = {}
        for ratio, one in plugins.items():
            self._students[ratio] = VariatorEncoder(backbone)
            self._students[ratio].attach(one)

    def train(self, mode: bool = True) -> Students:
        """Stay in eval mode: the backbone's dropout would blur what is to be learnt, plugins have none."""
        return super().train(False)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor | None = None,
        *,
        ratios: Sequence[int] | None = None,
    ) -> tuple[list[Tensor], dict[int, list[Tensor]]]:
        """Hidden states [B,S,H] of embeddings and every layer: the teacher's, and of all or some students by ratio."""
        feeds = (input_ids, attention_mask, token_type_ids)
        with torch.no_grad():
            teacher = list(self.teacher(*feeds, keep_states=True).hidden_states)
        students = {
            ratio: list(student(*feeds, keep_states=True).hidden_states)
            for ratio, student in self._students.items()
            if ratios is None or ratio in ratios
        }
        return teacher, students


def _hidden_weight(settings: FitSettings, ratio: int) -> float:
    return HIDDEN_WEIGHT if settings.regresses(ratio) else HIDDEN_WEIGHT_RANDOM_START


def takes_part(ratio: int, smallest: int, step: int) -> bool:
    """Whether a ratio is taught in a step: ``STEPS_SHARE * smallest / ratio`` of them, evenly spread, at most all."""
    share = min(1.0, STEPS_SHARE * smallest / ratio)
    return math.floor((step + 1) * share) > math.floor(step * share)


def hidden_error(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Mean squared error of all layers' outputs over real tokens, each in units of the teacher's variance there."""
    real = mask.bool()
    errors = []
    for ours, theirs in zip(student[1:], teacher[1:], strict=True):
        wanted = theirs[real].float()
        errors.append(F.mse_loss(ours[real].float(), wanted) / wanted.var(0).mean().clamp_min(1e-6))
    return torch.stack(errors).mean()


def output_error(backbone: Backbone, student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """How far the answer is from the backbone's: 1 - cosine of embeddings, or KL divergence of logits."""
    if backbone.task == "feature-extraction":
        return (
            1.0 - F.cosine_similarity(_embedding(backbone, student, mask), _embedding(backbone, teacher, mask))
        ).mean()
    ours, theirs = (task_outputs(backbone, h, mask) for h in (student, teacher))
    return torch.stack([_divergence(backbone, a, b, mask) for a, b in zip(ours, theirs, strict=True)]).mean()


def _embedding(backbone: Backbone, h: Tensor, mask: Tensor) -> Tensor:
    """[B,S,H] -> [B,H]: the folder's pooling, or the mean of the real tokens where it has none."""
    if backbone.pooling is not None:
        return pool(h.float(), mask, backbone)
    weights = mask.unsqueeze(-1).float()
    return (h.float() * weights).sum(1) / weights.sum(1).clamp_min(1.0)


def _divergence(backbone: Backbone, ours: Tensor, theirs: Tensor, mask: Tensor) -> Tensor:
    """KL(teacher, student) per answer; logits [B,C], per token [B,S,C], or over positions [B,S]."""
    if backbone.task == "token-classification":
        ours, theirs = ours[mask.bool()], theirs[mask.bool()]
    elif backbone.task == "question-answering":
        ours, theirs = (logits.float().masked_fill(~mask.bool(), -1e4) for logits in (ours, theirs))
    elif ours.shape[-1] == 1:  # regression
        return F.mse_loss(ours.float(), theirs.float())
    return F.kl_div(
        ours.float().log_softmax(-1), theirs.float().log_softmax(-1), log_target=True, reduction="batchmean"
    )


def batch_loss(
    backbone: Backbone,
    teacher: Sequence[Tensor],
    student: Sequence[Tensor],
    mask: Tensor,
    labels: Tensor | None,
    loss: Loss,
    hidden_weight: float = HIDDEN_WEIGHT,
) -> Tensor:
    """The loss of one ratio on one batch."""
    total = torch.zeros(())
    if loss != "task":
        total = hidden_weight * hidden_error(student, teacher, mask) + output_error(
            backbone, student[-1], teacher[-1], mask
        )
    if loss != "hidden":
        assert labels is not None
        total = total + F.cross_entropy(task_outputs(backbone, student[-1], mask)[0].float(), labels)
    return total


# --- the trainer ---------------------------------------------------------------------------------------------------


class PluginTrainer(Trainer):
    """``Trainer`` with the distillation loss summed over ratios, batches of similar length, and nothing printed."""

    def __init__(
        self,
        *args: Any,
        backbone: Backbone,
        fit: FitSettings,
        sampler: LengthBuckets,
        ratios: Sequence[int],
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.backbone, self.fit, self.sampler = backbone, fit, sampler
        self.ratios = ratios

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels", None)
        mask = inputs["attention_mask"]
        taught = [ratio for ratio in self.ratios if takes_part(ratio, min(self.ratios), self.state.global_step)]
        teacher, students = model(**inputs, ratios=taught)
        losses = [
            batch_loss(self.backbone, teacher, one, mask, labels, self.fit.loss, _hidden_weight(self.fit, ratio))
            for ratio, one in students.items()
        ]
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


def _run_trainer(
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
            data_collator=_collate(backbone),
            optimizers=(optimizer, schedule),
            callbacks=[_Watch(clock, progress, model)],
            backbone=backbone,
            fit=settings,
            sampler=sampler,
            ratios=list(plugins),
        )
        _remove_printing(trainer)
        trainer.train()
        return int(trainer.state.global_step)


def _parameter_groups(plugins: Mapping[int, VariatorPlugins], settings: FitSettings) -> list[dict[str, Any]]:
    groups: dict[float, list[Tensor]] = {}
    for ratio, one in plugins.items():
        start = 1.0 if settings.regresses(ratio) else RANDOM_START
        for name, parameter in one.named_parameters():
            factor = W_IN if name.endswith("w_in.weight") else W_OUT if name.endswith("w_out.weight") else REST
            groups.setdefault(start * factor, []).append(parameter)
    return [{"params": parameters, "lr": factor * settings.learning_rate} for factor, parameters in groups.items()]


def _arguments(scratch: str, settings: FitSettings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=scratch,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        max_grad_norm=1.0,
        seed=settings.seed,
        bf16=_bf16(settings),
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


# --- measuring -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def measure(
    backbone: Backbone,
    plugins: Mapping[int, VariatorPlugins],
    examples: Examples,
    settings: FitSettings,
    *,
    limit: int = MEASURED,
) -> tuple[str, float, dict[int, float]]:
    """(metric, the backbone's value, each ratio's value) on the first ``limit`` of the examples, in fp32."""
    examples = examples.take(range(min(len(examples), limit)))
    labels = None
    if backbone.task == "sequence-classification" and examples.labels is not None and len(backbone.labels) > 1:
        labels = label_ids(examples.labels, backbone.labels, examples.origin)
    rows = tokenise(backbone, examples, settings.max_length, labels)
    model = Students(backbone, plugins).eval()
    sums: dict[int, float] = dict.fromkeys((1, *plugins), 0.0)
    count = 0
    for batch in _batches(rows, settings.batch_size, _collate(backbone)):
        truth = batch.pop("labels", None)
        teacher, students = model(**batch)
        for ratio, states in {1: teacher, **students}.items():
            hits = _hits(backbone, states[-1], teacher[-1], batch["attention_mask"], truth)
            sums[ratio] += float(hits.sum())
        count += len(hits)
    means = {ratio: total / count for ratio, total in sums.items()}
    metric = "cosine" if backbone.task == "feature-extraction" else "agreement" if labels is None else "accuracy"
    return metric, means.pop(1), means


def _hits(backbone: Backbone, student: Tensor, teacher: Tensor, mask: Tensor, truth: Tensor | None) -> Tensor:
    """One number per answer, 1 the best: a cosine, or whether the answer is right."""
    if backbone.task == "feature-extraction":
        return F.cosine_similarity(_embedding(backbone, student, mask), _embedding(backbone, teacher, mask))
    ours, theirs = (task_outputs(backbone, h, mask) for h in (student, teacher))
    if backbone.task == "question-answering":
        same = [_best(a, mask) == _best(b, mask) for a, b in zip(ours, theirs, strict=True)]
        return (same[0] & same[1]).float()
    wanted = theirs[0].argmax(-1) if truth is None else truth
    right = (ours[0].argmax(-1) == wanted).float()
    return right[mask.bool()] if backbone.task == "token-classification" else right


def _best(logits: Tensor, mask: Tensor) -> Tensor:
    return logits.masked_fill(~mask.bool(), -torch.inf).argmax(-1)
