"""The folder of an unfinished run: what is kept, what is refused, and a training that goes on from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from calib import unfinished
from calib.clock import Clock
from calib.data import Examples
from calib.finetune import FinetuneSettings, finetune
from calib.fit import fit_variator
from calib.learners import open_learner
from calib.settings import FitSettings
from calib.unfinished import CLOCK, RUN, TENSORS, keeping
from compexport.errors import CompexportError, InputError
from exporter.backbone import load_backbone
from tests.models import TEXTS

MANY = [f"{text} {number}" for number in range(6) for text in TEXTS]
RUN_A = {"command": "train variator", "steps": 4, "learning_rate": 1e-3, "ratios": (2, 4)}


class Stop(Exception):
    """A process that ends at a certain step."""


def stop_at(step: int) -> Callable[..., None]:
    def progress(message: str, done: float | None = None, total: float | None = None) -> None:
        if message == "fit" and done == step:
            raise Stop

    return progress


pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_stopped_fit_goes_on_where_it_was(tiny: Callable[..., Path], tmp_path: Path) -> None:
    backbone = load_backbone(tiny())
    settings = FitSettings(steps=9, batch_size=32, max_length=24, precision="fp32")  # two batches to a pass
    whole = fit_variator(backbone, MANY, [2, 8], settings=settings)
    with pytest.raises(Stop), keeping(tmp_path / "out", RUN_A, resume=False, save_every=4) as state:
        fit_variator(backbone, MANY, [2, 8], settings=settings, unfinished=state, progress=stop_at(7))
    kept = [path.name for path in (tmp_path / "out.unfinished").glob("checkpoint-*")]
    assert kept == ["checkpoint-4"]
    # Plugins only: the backbone is 50 times as large.
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "out.unfinished" / "checkpoint-4" / TENSORS)
    assert all(name.startswith("plugins.") for name in tensors)
    steps: list[float | None] = []
    with keeping(tmp_path / "out", RUN_A, resume=True) as state:
        rest = fit_variator(
            backbone, MANY, [2, 8], settings=settings, unfinished=state,
            progress=lambda message, done=None, total=None: steps.append(done) if message == "fit" else None,
        )  # fmt: skip
    assert steps == [5, 6, 7, 8, 9] and rest.record["steps"] == 9
    for ratio, plugins in whole.plugins.items():
        ours = rest.plugins[ratio].state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in plugins.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_dropout_goes_on_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    examples = Examples(MANY, labels=["a", "b"] * 24)
    settings = FinetuneSettings(steps=6, batch_size=8, max_length=24, precision="fp32")
    whole = finetune(open_learner(tiny(), examples), examples, settings=settings).learner
    assert whole.model.config.hidden_dropout_prob > 0
    with pytest.raises(Stop), keeping(tmp_path / "out", RUN_A, resume=False, save_every=2) as state:
        finetune(open_learner(tiny(), examples), examples, settings=settings, unfinished=state, progress=stop_at(5))
    with keeping(tmp_path / "out", RUN_A, resume=True) as state:
        rest = finetune(open_learner(tiny(), examples), examples, settings=settings, unfinished=state).learner
    ours, theirs = rest.state_dict(), whole.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_time_used_counts_after_a_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("calib.clock.time.monotonic", lambda: now[0])
    clock = Clock(90.0, 1000, 60.0)
    clock.begin_steps()
    now[0] = 125.0
    share, record = clock.share(1), clock.record()
    now[0] = 9000.0
    later = Clock(9000.0, 1000, 60.0)
    later.go_on(record)
    later.begin_steps()
    assert later.share(1) == share == pytest.approx(0.5)


def checkpoint(folder: Path, step: int, *, whole: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    if whole:
        (path / CLOCK).write_text("{}")
    return path


def interrupted(tmp_path: Path) -> Path:
    """A run that left a checkpoint at step 120."""
    with pytest.raises(Stop), keeping(tmp_path / "out", RUN_A, resume=False) as state:
        checkpoint(state.folder, 120)
        raise Stop
    return tmp_path / "out.unfinished"


def test_what_is_kept_is_not_lost(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    with pytest.raises(InputError, match=r"out.unfinished: holds an unfinished run: got step 120; add --resume"):
        with keeping(tmp_path / "out", RUN_A, resume=False):
            pass
    with pytest.raises(InputError, match="got learning_rate 0.002, steps 5, expected learning_rate 0.001, steps 4"):
        with keeping(tmp_path / "out", {**RUN_A, "steps": 5, "learning_rate": 2e-3}, resume=True):
            pass
    assert (folder / "checkpoint-120").exists()
    with keeping(tmp_path / "out", RUN_A, resume=True) as state:
        assert state.latest() == folder / "checkpoint-120"
    assert not folder.exists()


def test_the_newest_whole_checkpoint_counts(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    checkpoint(folder, 99)
    checkpoint(folder, 130, whole=False)  # killed while it was written
    state = unfinished.Unfinished(folder)
    assert state.latest() == folder / "checkpoint-120"
    state.complete(checkpoint(folder, 140, whole=False), {"elapsed_s": 1.0})
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-140"]


def test_a_run_without_a_checkpoint_is_no_loss(tmp_path: Path) -> None:
    with pytest.raises(Stop), keeping(tmp_path / "out", RUN_A, resume=False):
        raise Stop
    assert not (tmp_path / "out.unfinished").exists()
    # A killed process leaves its description.
    (tmp_path / "out.unfinished").mkdir()
    (tmp_path / "out.unfinished" / RUN).write_text("{")
    checkpoint(tmp_path / "out.unfinished", 3, whole=False)
    for resume in (False, True):
        with keeping(tmp_path / "out", RUN_A, resume=resume) as state:
            assert state.latest() is None


def test_other_peoples_folders_and_damage(tmp_path: Path) -> None:
    folder = interrupted(tmp_path)
    (folder / RUN).write_text("{")
    with pytest.raises(InputError, match="run.json: unreadable: .*; delete that folder to start anew"):
        with keeping(tmp_path / "out", RUN_A, resume=True):
            pass
    (tmp_path / "mine.unfinished").mkdir()
    (tmp_path / "mine.unfinished" / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(InputError, match="already there: expected nothing, or an unfinished run of ours"):
            with keeping(tmp_path / "mine", RUN_A, resume=resume):
                pass
    assert (tmp_path / "mine.unfinished" / "thesis.txt").exists()


@pytest.mark.parametrize(("content", "message"), [(b"cut", "unreadable"), (None, "other tensors than are trained")])
def test_damaged_tensors_are_said(
    tiny: Callable[..., Path], tmp_path: Path, content: bytes | None, message: str
) -> None:
    from safetensors.torch import save_file

    backbone = load_backbone(tiny())
    settings = FitSettings(steps=4, batch_size=4, max_length=24, precision="fp32")
    with pytest.raises(Stop), keeping(tmp_path / "out", RUN_A, resume=False, save_every=2) as state:
        fit_variator(backbone, MANY, [2], settings=settings, unfinished=state, progress=stop_at(3))
    file = tmp_path / "out.unfinished" / "checkpoint-2" / TENSORS
    if content is None:
        save_file({"strange": torch.zeros(1)}, file)
    else:
        file.write_bytes(content)
    with pytest.raises(InputError, match=message):
        with keeping(tmp_path / "out", RUN_A, resume=True) as state:
            fit_variator(backbone, MANY, [2], settings=settings, unfinished=state)


def test_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert unfinished.place(Path("a/b")) == Path("a/b.unfinished")
    assert unfinished.place(Path()) == tmp_path.with_name(tmp_path.name + ".unfinished")


@pytest.mark.parametrize("save_every", [None, 2])
def test_a_diverged_run_is_neither_saved_nor_resumed(
    tiny: Callable[..., Path], tmp_path: Path, save_every: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = Examples(MANY, labels=["a", "b"] * 24)
    settings = FinetuneSettings(steps=4, batch_size=8, max_length=24, precision="fp32")

    def lost(model: torch.nn.Module, batch: dict[str, torch.Tensor], step: int) -> torch.Tensor:
        batch.pop("labels")
        return model(**batch).sum() * (float("nan") if step == 3 else 1.0)

    monkeypatch.setattr("calib.finetune._cross_entropy", lost)
    for resume in (False, True):
        with pytest.raises(CompexportError, match="training diverged: got NaN in the trained tensors; lower the"):
            with keeping(tmp_path / "out", RUN_A, resume=resume, save_every=save_every) as state:
                finetune(open_learner(tiny(), examples), examples, settings=settings, unfinished=state)
        kept = [path.name for path in (tmp_path / "out.unfinished").glob("checkpoint-*")]
        assert kept == ([] if save_every is None else ["checkpoint-2"])


def test_numbers_that_are_none_are_not_taken_from_a_checkpoint(tiny: Callable[..., Path], tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    backbone = load_backbone(tiny())
    settings = FitSettings(steps=2, batch_size=4, max_length=24, precision="fp32")
    with pytest.raises(Stop), keeping(tmp_path / "out", RUN_A, resume=False) as state:
        fit_variator(backbone, MANY, [2], settings=settings, unfinished=state)
        raise Stop  # the result was not written
    file = tmp_path / "out.unfinished" / "checkpoint-2" / TENSORS
    save_file({name: tensor * torch.nan for name, tensor in load_file(file).items()}, file)
    with (
        pytest.raises(CompexportError, match="training diverged"),
        keeping(tmp_path / "out", RUN_A, resume=True) as state,
    ):
        fit_variator(backbone, MANY, [2], settings=settings, unfinished=state)


def test_two_runs_on_one_output(tmp_path: Path) -> None:
    with keeping(tmp_path / "out", RUN_A, resume=False) as state:
        kept = checkpoint(state.folder, 3)
        attempts = [lambda: unfinished.require_none(tmp_path / "out")]
        attempts += [lambda again=again: keeping(tmp_path / "out", RUN_A, resume=again).__enter__() for again in (0, 1)]
        for attempt in attempts:
            with pytest.raises(
                InputError, match=r"another process \(pid \d+\) is writing .*out.unfinished; wait until"
            ):
                attempt()
        assert (kept / CLOCK).exists() and (state.folder / RUN).exists()
    assert list(tmp_path.iterdir()) == []
    # The lock of a killed process stays behind as a file only.
    (tmp_path / ".out.unfinished.lock").write_text("1")
    with keeping(tmp_path / "out", RUN_A, resume=False):
        pass


def test_another_number_of_processes_is_another_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(tmp_path)
    monkeypatch.setattr("calib.processes.count", lambda: 2)
    monkeypatch.setattr("calib.processes.by_first", lambda do: do())
    with pytest.raises(InputError, match="had other settings: got processes 2, expected processes 1"):
        with keeping(tmp_path / "out", RUN_A, resume=True):
            pass


def test_a_finished_stage_leaves_its_result_in_place_of_its_checkpoints(tmp_path: Path) -> None:
    with pytest.raises(Stop), keeping(tmp_path / "out", RUN_A, resume=False) as state:
        part = state.part("first")
        assert part.finished() is None
        (part.folder / "checkpoint-3").mkdir(parents=True)
        part.finish({"steps": 3}, {"x": torch.arange(3.0)})
        assert sorted(path.name for path in part.folder.iterdir()) == ["result.json", "result.safetensors"]
        raise Stop
    with pytest.raises(InputError, match="holds an unfinished run: got a finished stage; add --resume"):
        unfinished.require_none(tmp_path / "out")
    with keeping(tmp_path / "out", RUN_A, resume=True) as state:
        part = state.part("first")
        assert part.finished() == {"steps": 3} and part.result()["x"].tolist() == [0, 1, 2]
        part.drop_result()
        part.drop_result()
        assert part.finished() == {"steps": 3}
        with pytest.raises(InputError, match="result.safetensors: unreadable"):
            part.result()
    assert list(tmp_path.iterdir()) == []
