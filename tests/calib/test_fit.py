"""Fitting on tiny models: what may change, what must not, and that it helps."""

from __future__ import annotations

import hashlib
import math
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from calib.arithmetic import PRECISIONS, uses_bf16
from calib.batches import Collate, LengthBuckets, tokenise
from calib.clock import Clock
from calib.data import Examples
from calib.distillation import parameter_groups
from calib.fit import fit_separately, fit_variator, held_out_rows
from calib.losses import batch_loss, takes_part
from calib.mixer_start import prefer_quiet_tokens, quiet_direction
from calib.settings import FitSettings
from calib.students import Students
from compexport.errors import InputError
from exporter.backbone import Backbone, load_backbone
from exporter.methods.span import SpanPlugins, default_rank
from exporter.methods.variator import VariatorPlugins
from tests.models import TEXTS

MANY = [f"{text} {number}" for number in range(6) for text in TEXTS]
QUICK = FitSettings(steps=2, batch_size=4, max_length=24, precision="fp32")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def backbone(tiny: Callable[..., Path]) -> Backbone:
    return load_backbone(tiny())


def checksum(backbone: Backbone) -> str:
    digest = hashlib.sha256()
    for name, tensor in backbone.model.state_dict().items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def batch_of(backbone: Backbone, texts: list[str] = TEXTS) -> dict[str, torch.Tensor]:
    return Collate(0)(tokenise(backbone, Examples(texts), 24))


def test_gradients_reach_plugins_only(backbone: Backbone) -> None:
    plugins = VariatorPlugins(backbone.hidden_size, backbone.num_layers, 2, 4)
    batch = batch_of(backbone)
    teacher, students = Students(backbone, {2: plugins})(**batch)
    batch_loss(backbone, plugins, teacher, students[2], batch["attention_mask"], None, "hidden").backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in plugins.parameters() if p.numel() > 2)
    assert all(p.grad is None for p in backbone.model.parameters())


def test_a_fit_leaves_the_backbone_alone(tiny: Callable[..., Path], capfd: pytest.CaptureFixture[str]) -> None:
    backbone = load_backbone(tiny(), attention="sdpa")
    before = checksum(backbone)
    stages = []
    result = fit_variator(backbone, MANY, [2, 4], settings=QUICK, progress=lambda message, *_: stages.append(message))
    assert checksum(backbone) == before
    assert backbone.model.config._attn_implementation == "sdpa" and not backbone.model.training
    assert result.record["steps"] == 2 and result.record["metric"] == "cosine"
    assert result.record["teacher"] == pytest.approx(1.0) and set(result.record["student"]) == {"2", "4"}
    assert result.record["extra_params"]["2"] == result.plugins[2].params
    assert {"tokenise", "mixer start", "fit", "measure"} <= set(stages)
    assert capfd.readouterr() == ("", "")


def test_a_seed_repeats_a_fit(backbone: Backbone) -> None:
    first, second = (fit_variator(backbone, MANY, [2], settings=QUICK).plugins[2].state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_nothing_is_written_where_one_works(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = fit_variator(backbone, MANY, [2], settings=QUICK)
    assert list(tmp_path.iterdir()) == [] and not caught
    checkpoint = result.save(tmp_path / "fitted", backbone)
    assert checkpoint.ratios == [2] and checkpoint.pad == "masked"
    assert checkpoint.settings["training"]["steps"] == 2


def test_small_ratios_are_taught_more_often() -> None:
    steps = {ratio: sum(takes_part(ratio, 2, step) for step in range(800)) for ratio in (2, 3, 4, 8)}
    assert steps == {2: 800, 3: 800, 4: 800, 8: 400}
    assert all(takes_part(8, 8, step) for step in range(10))  # alone, a ratio has every step


def test_mixers_start_by_preferring_quiet_tokens() -> None:
    x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    norms = 10 + x @ torch.tensor([3.0, -1, 0, 0, 0, 0])
    logits = x @ quiet_direction(x, norms)
    slope = float(torch.linalg.lstsq(norms[:, None] - norms.mean(), (logits - logits.mean())[:, None]).solution)
    assert slope == pytest.approx(-1 / (0.5 * float(norms.mean())), rel=0.05)


def test_steps_lower_the_error(backbone: Backbone) -> None:
    settings = FitSettings(steps=40, batch_size=8, max_length=24, precision="fp32", widths={4: 8})
    result = fit_variator(backbone, MANY, [4], held_out=MANY, settings=settings)
    start = fit_variator(backbone, MANY, [4], held_out=MANY, settings=FitSettings(**{**vars(settings), "steps": 1}))
    assert result.record["student"]["4"] > start.record["student"]["4"]


@pytest.mark.parametrize("task", ["sequence-classification", "token-classification", "question-answering"])
def test_other_tasks(tiny: Callable[..., Path], task: str) -> None:
    backbone = load_backbone(tiny("tiny-bert", task))
    pairs = MANY if task == "question-answering" else None
    result = fit_variator(backbone, Examples(MANY, pairs), [2], settings=QUICK)
    assert result.record["metric"] == "agreement" and 0 <= result.record["student"]["2"] <= 1


HOSTS = ["tiny-bert", "tiny-roberta", "tiny-distilbert", "tiny-electra", "tiny-t5", "tiny-t5-gated", "tiny-bart"]


@pytest.mark.parametrize("name", ["tiny-roberta", "tiny-distilbert", "tiny-electra", "tiny-t5", "tiny-bart"])
def test_other_hosts(tiny: Callable[..., Path], name: str) -> None:
    assert fit_variator(load_backbone(tiny(name)), MANY, [2], settings=QUICK).record["steps"] == 2


def first_and_last(layer: Any) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The modules of a transformers layer whose input is the FFN's, and whose output is."""
    if hasattr(layer, "intermediate"):
        return layer.intermediate, layer.output.dense
    if hasattr(layer, "ffn"):
        return layer.ffn, layer.ffn
    if hasattr(layer, "fc1"):
        return layer.fc1, layer.fc2
    return layer.layer[1].DenseReluDense, layer.layer[1].DenseReluDense


@pytest.mark.parametrize("name", [*HOSTS, "tiny-mbart"])
def test_mixers_start_from_what_transformers_computes(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Every layer's FFN inputs and output norms, of the tokens that are no padding."""
    backbone = load_backbone(tiny(name))
    with torch.no_grad():  # as after training: fresh norms and biases are ones and zeros, which hide one left out
        for tensor in backbone.encoder.parameters():
            tensor.add_(0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())))
    batch = batch_of(backbone)
    real = batch["attention_mask"].bool()
    assert not real.all()
    wanted: list[torch.Tensor] = []
    for layer in backbone.layers:
        first, last = first_and_last(layer)
        first.register_forward_pre_hook(lambda module, given: wanted.append(given[0][real]))
        last.register_forward_hook(lambda module, given, output: wanted.append(output[real].norm(dim=-1)))
    with torch.no_grad():
        backbone.encoder(**batch)
    expected, given = list(wanted), []

    def record(x: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
        given.extend([x, norms])
        return quiet_direction(x, norms)

    monkeypatch.setattr("calib.mixer_start.quiet_direction", record)
    plugins = VariatorPlugins(backbone.hidden_size, backbone.num_layers, 2, 4)
    prefer_quiet_tokens(backbone, {2: plugins}, [batch])
    assert len(given) == len(expected) == 2 * backbone.num_layers
    for ours, theirs in zip(given, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("loss", ["task", "task-hidden"])
def test_labels_may_be_learnt_too(tiny: Callable[..., Path], loss: str) -> None:
    backbone = load_backbone(tiny("tiny-bert", "sequence-classification"))
    labels = ["Positive", 0, "1", 1.0] * (len(MANY) // 4)
    settings = FitSettings(**{**vars(QUICK), "loss": loss})
    assert fit_variator(backbone, Examples(MANY, labels=labels), [2], settings=settings).record["metric"] == "accuracy"


@pytest.mark.parametrize("loss", ["hidden", "task-hidden"])
def test_spans_learn(tiny: Callable[..., Path], loss: str) -> None:
    backbone = load_backbone(tiny("tiny-bert", "sequence-classification"))
    examples = Examples(MANY, labels=["positive", "negative"] * (len(MANY) // 2))
    settings = replace(QUICK, span=2, loss=loss, steps=60, learning_rate=1e-2)
    first = SpanPlugins(backbone, 4, 1, default_rank(backbone, 4, 1))
    before = checksum(backbone)
    result = fit_variator(backbone, examples, [4], settings=settings)
    assert checksum(backbone) == before
    fitted = result.plugins[4]
    assert isinstance(fitted, SpanPlugins) and (fitted.first, fitted.rank) == (1, first.rank)
    batch = Collate(0)(tokenise(backbone, examples, 24, [1, 0] * (len(MANY) // 2)))
    mask, labels = batch["attention_mask"], batch.pop("labels")
    errors = []
    for one in (first, fitted):
        teacher, students = Students(backbone, {4: one})(**batch)
        errors.append(batch_loss(backbone, one, teacher, students[4], mask, labels, settings.loss).item())
    assert errors[1] < errors[0]


def test_what_cannot_be_fitted_is_said(tiny: Callable[..., Path], backbone: Backbone) -> None:
    classifier = load_backbone(tiny("tiny-bert", "sequence-classification"))
    task = FitSettings(**{**vars(QUICK), "loss": "task"})
    with pytest.raises(InputError, match="no texts to fit on"):
        fit_variator(backbone, [], [2])
    with pytest.raises(InputError, match="ratios to fit"):
        fit_variator(backbone, MANY, [1])
    with pytest.raises(InputError, match="expected sequence-classification"):
        fit_variator(backbone, MANY, [2], settings=task)
    with pytest.raises(InputError, match="needs labels"):
        fit_variator(classifier, MANY, [2], settings=task)
    with pytest.raises(InputError, match="unknown label: got 'maybe', expected one of negative, positive or 0 to 1"):
        fit_variator(classifier, Examples(MANY, labels=["maybe"] * len(MANY)), [2], settings=task)


@pytest.mark.parametrize(
    "wrong",
    [{"steps": 0}, {"batch_size": -1}, {"learning_rate": 0.0}, {"max_length": 2}, {"max_seconds": 0.0}, {"loss": "x"}],
)
def test_settings_are_checked(backbone: Backbone, wrong: dict[str, object]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        fit_variator(backbone, MANY, [2], settings=FitSettings(**wrong))  # type: ignore[arg-type]


def test_texts_are_kept_from_training_to_measure_on() -> None:
    kept = {rows: held_out_rows(rows) for rows in (1, 9, 10, 11, 2560, 2561, 2815, 70000)}
    counts = {rows: len(one) for rows, one in kept.items()}
    assert counts == {1: 0, 9: 0, 10: 1, 11: 2, 2560: 256, 2561: 233, 2815: 256, 70000: 256}
    assert all(set(one) < set(range(rows)) for rows, one in kept.items())


def test_batches_hold_texts_of_similar_length() -> None:
    lengths = [3, 40] * 20 + [5]
    order = [i for batch in LengthBuckets(lengths, 4, 0, 11) for i in batch]
    assert sorted(order) == list(range(41))
    batches = [[lengths[i] for i in order[start : start + 4]] for start in range(0, 41, 4)]
    assert sum(len(set(batch)) > 1 for batch in batches) <= 4


def test_processes_share_every_batch() -> None:
    lengths = [3, 40, 7] * 14  # 42 rows: batches of 8, and a last one of 2
    whole = list(LengthBuckets(lengths, 8, seed=0, steps=15))
    shares = [list(LengthBuckets(lengths, 8, seed=0, steps=15, share=(process, 3))) for process in range(3)]
    assert len(whole) == 15 and {len(batch) for batch in whole} == {8, 2}
    for batch, *parts in zip(whole, *shares, strict=True):
        # As many rows in each: those of the batch, filled up with one other where 8 or 2 do not divide by 3.
        assert {len(part) for part in parts} == {math.ceil(len(batch) / 3)}
        rows = [row for part in parts for row in part]
        assert not Counter(batch) - Counter(rows) and len(set(rows)) >= len(batch)
    pairs = [list(LengthBuckets(lengths, 8, seed=0, steps=15, share=(process, 2))) for process in range(2)]
    assert [sorted(batch) for batch in whole] == [sorted(first + second) for first, second in zip(*pairs, strict=True)]


def test_a_fit_goes_on_from_plugins_that_are_there(backbone: Backbone) -> None:
    settings = replace(QUICK, pad="official", learning_rate=1e-9)
    given = VariatorPlugins(backbone.hidden_size, backbone.num_layers, 2, 5, "official").requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in given.state_dict().items()}
    result = fit_variator(backbone, MANY, [2, 4], settings=settings, start={2: given, 8: given})
    assert result.record["continued"] == [2] and result.plugins[2].width == 5
    for name, tensor in result.plugins[2].state_dict().items():
        torch.testing.assert_close(tensor, before[name])  # started there, and hardly moved
        assert torch.equal(given.state_dict()[name], before[name])
    assert result.plugins[2] is not given and result.checkpoint_settings()["pad"] == "official"


def test_plugins_that_are_there_learn_more_slowly(backbone: Backbone) -> None:
    plugins = {ratio: VariatorPlugins(backbone.hidden_size, 2, ratio, 4) for ratio in (2, 4)}
    groups = parameter_groups(plugins, 1.0, continued=[4])
    rates = {id(tensor): group["lr"] for group in groups for tensor in group["params"]}
    for new, old in zip(plugins[2].parameters(), plugins[4].parameters(), strict=True):
        assert rates[id(old)] == rates[id(new)] / 2


def test_ratios_one_after_the_other(backbone: Backbone) -> None:
    both = fit_separately(backbone, MANY, [2, 4], settings=QUICK)
    for ratio in (2, 4):
        alone = fit_variator(backbone, MANY, [ratio], settings=QUICK)
        theirs = alone.plugins[ratio].state_dict()
        assert all(torch.equal(one, theirs[name]) for name, one in both.plugins[ratio].state_dict().items())
        assert both.record["student"][str(ratio)] == alone.record["student"][str(ratio)]
    assert both.record["ratios"] == [2, 4] and both.record["steps"] == 2 and both.record["separately"]


def test_labels_are_checked_before_a_fit_that_only_measures_with_them(tiny: Callable[..., Path]) -> None:
    classifier = load_backbone(tiny("tiny-bert", "sequence-classification"))
    stages: list[str] = []
    with pytest.raises(InputError, match="unknown label: got 'maybe'"):
        labelled = Examples(MANY, labels=["maybe"] * len(MANY))
        fit_variator(classifier, labelled, [2], settings=QUICK, progress=lambda message, *_: stages.append(message))
    assert not stages


@pytest.mark.parametrize(("flags", "native"), [("fma avx512_bf16 amx_tile", True), ("fma avx2", False)])
def test_bf16_where_it_is_native(monkeypatch: pytest.MonkeyPatch, flags: str, native: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("calib.arithmetic._cpu_flags", lambda: flags)
    assert [uses_bf16(precision) for precision in PRECISIONS] == [native, False, True]


def test_both_precisions_fit(backbone: Backbone) -> None:
    results = [fit_variator(backbone, MANY, [2], settings=replace(QUICK, precision=one)) for one in ("fp32", "bf16")]
    ours, theirs = (result.plugins[2].state_dict() for result in results)
    assert not all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, tensor in theirs.items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, ours[name], atol=0.02, rtol=0.1)


def test_a_late_start_still_leaves_time_for_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("calib.clock.time.monotonic", lambda: now[0])
    clock = Clock(0.0, 1000, 60.0, stepping=100.0)
    now[0] = 115.0
    assert clock.share(3) == pytest.approx(0.5)
    now[0] = 130.0
    assert clock.share(6) == 1.0 and clock.learning_rate(6) == 0.0


def test_the_learning_rate_rises_as_long_as_is_asked() -> None:
    rates = [Clock(0.0, 100, warm_up=0.1).learning_rate(step) for step in (0, 4, 9, 50, 100)]
    assert rates == pytest.approx([0.1 * 1.0, 0.5 * 0.96, 1.0 * 0.91, 0.5, 0.0])
    assert Clock(0.0, 100).learning_rate(4) == pytest.approx(0.96)  # a twentieth of it, by default
