"""Training runs in processes of their own, so that they can be killed; and what two runs wrote, compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch

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


# A run that kills itself as soon as a checkpoint of it, or of its stage argv[1], is whole: however busy the machine is,
# neither earlier nor later.
KILLING_ITSELF = """
import os, signal, sys
from calib.unfinished import Unfinished
from compexport.cli import main

complete, stage = Unfinished.complete, sys.argv[1]

def killing(self, *arguments):
    complete(self, *arguments)
    if stage in ("", self.folder.name):
        os.kill(os.getpid(), signal.SIGKILL)

Unfinished.complete = killing
main(sys.argv[2:])
"""


def killed_once_saved(folder: Path, output: str, *command: object, stage: str = "") -> None:
    """Start a run in ``folder`` that dies of kill -9 as soon as something of it, or of its ``stage``, is saved."""
    process = in_a_process(folder, "-c", KILLING_ITSELF, stage, *command, "-o", output)
    said = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, said
    assert list((folder / f"{output}.unfinished").rglob("clock.json"))
    assert not (folder / output).exists()
