"""Training runs in processes of their own, so that they can be killed; and what two runs wrote, compared."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
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


def killed_once_saved(folder: Path, output: str, *command: object, stage: str = "**") -> None:
    """Start a run in ``folder`` and kill it as soon as something of it, or of one of its stages, is saved."""
    process = in_a_process(folder, "-m", "compexport", *command, "-o", output)
    deadline = time.monotonic() + 120
    while not list((folder / f"{output}.unfinished").glob(f"{stage}/checkpoint-*/clock.json")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (folder / output).exists()
