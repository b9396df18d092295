"""Training runs in processes of their own, so that they can be killed; and what two runs wrote, compared."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from compexport.cli import main

ROOT = Path(__file__).resolve().parents[2]


def tensors(file: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(file)


def same(first: Path, second: Path) -> bool:
    ours, theirs = tensors(first), tensors(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def in_a_process(folder: Path, *command: object, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@dataclass(frozen=True)
class Whole:
    """A run that came to its end: what it was told but for its output, its document, and where its output is."""

    command: list[object]
    document: dict[str, Any]
    output: Path

    @classmethod
    def run(cls, command: list[object], output: Path) -> Whole:
        """In this process, on one thread, as the runs that it is compared with."""
        threads, said = torch.get_num_threads(), io.StringIO()
        torch.set_num_threads(1)
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
                assert main([*map(str, command), "-o", str(output), "--json"]) == 0
        finally:
            torch.set_num_threads(threads)
        return cls(command, json.loads(said.getvalue()), output)


def killed_once_saved(folder: Path, output: str, *command: object, stage: str = "") -> None:
    """Start a run in ``folder`` that dies of kill -9 as soon as something of it, or of its ``stage``, is saved."""
    with tempfile.NamedTemporaryFile("r") as said:
        arguments = (folder, said.name, stage, [*map(str, command), "-o", output])
        process = _PROCESSES.Process(target=_kill_itself, args=arguments)
        process.start()
        process.join(300)
        assert process.exitcode == -signal.SIGKILL, said.read()
    assert list((folder / f"{output}.unfinished").rglob("clock.json"))
    assert not (folder / output).exists()


# Forked from a process that has loaded the libraries and trained nothing: to load them takes six seconds each time.
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["calib.costeff.fit", "calib.ode.fit", "compexport.training", "exporter.backbone"])


def _kill_itself(folder: Path, said: str, stage: str, command: list[str]) -> None:
    """A run that ends as soon as a checkpoint of it, or of its stage, is whole, on a busy machine as on an idle one."""
    from calib.unfinished import Unfinished

    os.chdir(folder)
    with open(said, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    complete = Unfinished.complete

    def killing(self: Unfinished, *arguments: Any) -> None:
        complete(self, *arguments)
        if stage in ("", self.folder.name):
            os.kill(os.getpid(), signal.SIGKILL)

    Unfinished.complete = killing  # type: ignore[method-assign]
    torch.set_num_threads(1)
    sys.exit(main(command))
