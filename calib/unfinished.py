"""What an interrupted training run leaves, so that it can go on: a folder beside its output, ``OUT.unfinished``.

    run.json                        what was asked for; another run must not continue it
    checkpoint-120/                 of transformers.Trainer: optimizer, schedule, random numbers
        trainable.safetensors       the tensors that are trained, and no others
        clock.json                  seconds used so far; written last, so a checkpoint without it is not whole

Runs of several fits (ratios or stages one after the other) keep each fit's checkpoints in a folder of its own; a fit on
whose result others build leaves that there instead:

    hidden/result.safetensors   what it made
    hidden/result.json          its record; written last
    backbone/                   a model that was fine-tuned on the way

A lock beside the folder, which the kernel drops with its process, keeps a second run away.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib import processes
from compexport.errors import InputError, describe
from engines.atomic import WriterLock, write_file

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".unfinished"
RUN, CLOCK, TRAINER_STATE, TENSORS = "run.json", "clock.json", "trainer_state.json", "trainable.safetensors"
RESULT, RESULT_TENSORS = "result.json", "result.safetensors"
BACKBONE = "backbone"
FORMAT = 1


@dataclass(frozen=True)
class Unfinished:
    """The folder of one run, or of one fit in it. ``save_every``: steps after which it is saved whatever the time."""

    folder: Path
    save_every: int | None = None

    def part(self, name: str) -> Unfinished:
        """The place of one of several fits."""
        return Unfinished(self.folder / name, self.save_every)

    @property
    def backbone(self) -> Path:
        """The place of a model that is fine-tuned before its method is."""
        return self.folder / BACKBONE

    def latest(self) -> Path | None:
        """The newest whole checkpoint; the same in all processes."""

        def find() -> Path | None:
            whole = [path.parent for path in self.folder.glob(f"checkpoint-*/{CLOCK}")]
            return max(whole, key=step_of, default=None)

        return processes.by_first(find)

    def complete(self, checkpoint: Path, clock: Mapping[str, Any]) -> None:
        """Mark ``checkpoint`` as whole and drop all others; by the first process only."""
        write_json(checkpoint / CLOCK, clock)
        for other in self.folder.glob("checkpoint-*"):
            if other != checkpoint:
                shutil.rmtree(other, ignore_errors=True)

    def finish(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
        """Keep what a fit made, and its record (JSON), in place of its checkpoints; by the first process only."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if tensors is not None:
            write_tensors(self.folder / RESULT_TENSORS, tensors)
        write_json(self.folder / RESULT, record)
        for checkpoint in self.folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)

    def finished(self) -> dict[str, Any] | None:
        """The record of a fit that is finished; the same in all processes."""

        def find() -> dict[str, Any] | None:
            return read_json(self.folder / RESULT) if (self.folder / RESULT).is_file() else None

        return processes.by_first(find)

    def result(self) -> dict[str, Tensor]:
        """The tensors that a finished fit made; InputError when they are damaged."""
        return read_tensors(self.folder / RESULT_TENSORS)

    def drop_result(self) -> None:
        """Others have built on the tensors: keep only the record. By the first process only."""
        (self.folder / RESULT_TENSORS).unlink(missing_ok=True)


def place(output: Path) -> Path:
    """Where the unfinished run of ``output`` is kept."""
    named = output if output.name not in {"", ".."} else output.resolve()
    return named.with_name(named.name + SUFFIX)


def require_none(output: Path) -> None:
    """InputError when an unfinished run of ``output`` would be lost, or is still at work."""
    folder = place(output)
    if folder.exists():
        with ExitStack() as locks:
            _lock(folder, locks)
            _require_nothing_kept(folder)


def _lock(folder: Path, locks: ExitStack) -> None:
    """Be the only one at work on ``folder`` until ``locks`` are closed; InputError where another is."""
    lock = WriterLock(folder)
    lock.acquire()
    locks.callback(lock.release)


def _require_nothing_kept(folder: Path) -> None:
    if _something_kept(folder):
        steps = [step_of(path.parent) for path in folder.rglob(CLOCK)]
        got = f"step {max(steps)}" if steps else "a finished stage"
        hint = "add --resume to continue it, or delete that folder to start anew"
        raise InputError(describe(f"{folder}: holds an unfinished run", got=got, hint=hint))
    if any(folder.iterdir()) and not (folder / RUN).is_file():
        raise InputError(describe(f"{folder}: already there", expected="nothing, or an unfinished run of ours"))


def _something_kept(folder: Path) -> bool:
    """Whether there is anything to go on from."""
    return any(folder.rglob(CLOCK)) or any(folder.rglob(RESULT))


@contextmanager
def keeping(
    output: Path, run: Mapping[str, Any], *, resume: bool, save_every: int | None = None
) -> Iterator[Unfinished]:
    """The folder of the run that ``run`` describes (JSON values); with ``resume``, what is there is kept.

    Write the result inside: afterwards the folder is gone. An error leaves it, if there is anything to go on from.
    Raises InputError for a run that was left unfinished when it is not to be resumed, or had other settings or another
    number of processes, and where another run is at work.
    """
    folder = place(output)
    # Through JSON and back, so that it compares equal to what was read.
    wanted = json.loads(json.dumps({"format": FORMAT, "processes": processes.count(), **run}))
    with ExitStack() as locks:  # of the first process; the others hold none
        processes.by_first(lambda: _prepare(folder, wanted, resume, locks))
        try:
            yield Unfinished(folder, save_every)
        except BaseException:
            # Not asked of all: the others may have failed elsewhere.
            if processes.rank() == 0 and not _something_kept(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        processes.by_first(lambda: shutil.rmtree(folder, ignore_errors=True))


def _prepare(folder: Path, wanted: Mapping[str, Any], resume: bool, locks: ExitStack) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    _lock(folder, locks)
    if resume and _something_kept(folder):
        _require_same(folder, wanted)
        return
    if folder.exists():
        _require_nothing_kept(folder)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    write_json(folder / RUN, wanted)


def _require_same(folder: Path, wanted: Mapping[str, Any]) -> None:
    try:
        found = json.loads((folder / RUN).read_text(encoding="utf-8"))
        other = [name for name in sorted({*found, *wanted}) if found.get(name) != wanted.get(name)]
    except (OSError, ValueError, TypeError) as error:
        hint = "delete that folder to start anew"
        raise InputError(describe(f"{folder / RUN}: unreadable", got=error, hint=hint)) from error
    if other:
        hint = "repeat the first command to continue, or delete that folder to start anew"
        then, now = (", ".join(f"{name} {_short(each.get(name))}" for name in other) for each in (found, wanted))
        raise InputError(
            describe(f"{folder}: the unfinished run had other settings", got=now, expected=then, hint=hint)
        )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "..."


def step_of(checkpoint: Path) -> int:
    """Steps done at a checkpoint; its name ends in them."""
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdigit() else 0


def read_json(path: Path) -> dict[str, Any]:
    """A file of a checkpoint; InputError when it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError("no JSON object")
    except (OSError, ValueError) as error:
        hint = "delete its folder to start anew"
        raise InputError(describe(f"{path}: unreadable", got=error, hint=hint)) from error
    return found


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """A file that is there whole or not at all."""
    write_file(path, (json.dumps(value, indent=1) + "\n").encode())


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of an unfinished run; InputError when the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        hint = "delete its folder to start anew"
        raise InputError(describe(f"{path}: unreadable", got=error, hint=hint)) from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Replaced whole or not at all."""
    from safetensors.torch import save

    write_file(path, save({name: one.detach().cpu().contiguous() for name, one in tensors.items()}))
