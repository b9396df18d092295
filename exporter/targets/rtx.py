"""TensorRT-RTX's own ONNX parser, which needs no GPU: asked in a process of its own, so that it may die there."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

CHILD = Path(__file__).with_name("rtx_child.py")
TIMEOUT_S = 600


@dataclass(frozen=True)
class Refusal:
    """One error of the parser, with the node and the functions it stands in; empty where it names none."""

    says: str
    operator: str = ""
    node: str = ""
    functions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Parsed:
    """What the parser said. ``outputs``: shapes, -1 for a size that is known at run time only."""

    ok: bool
    version: str
    errors: tuple[Refusal, ...]
    outputs: dict[str, list[int]]


def unavailable() -> str:
    """Why it cannot be asked here, empty when it can."""
    found = importlib.util.find_spec("tensorrt_rtx") is not None
    return "" if found else "tensorrt_rtx is not installed; pip install 'compexport[rtx]' also parses for real"


def parse(path: Path, timeout_s: float = TIMEOUT_S) -> Parsed:
    """Let TensorRT-RTX parse an ONNX file; a parser that dies or hangs is a refusal too."""
    command = [sys.executable, "-P", "-W", "ignore", str(CHILD), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return _failed(f"the parser was stopped after {timeout_s:g} s")
    if done.returncode != 0:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        return _failed(": ".join([f"the parser died of {_cause(done.returncode)}", *last]))
    answer = json.loads(done.stdout)
    errors = tuple(
        Refusal(error["says"], error["operator"], error["node"], tuple(error["functions"]))
        for error in answer["errors"]
    )
    return Parsed(answer["ok"], answer["version"], errors, answer["outputs"])


def _failed(says: str) -> Parsed:
    return Parsed(False, "", (Refusal(says),), {})


def _cause(code: int) -> str:
    if code >= 0:
        return f"an error, exit code {code}"
    known = {known.value: known.name for known in signal.Signals}
    return known.get(-code, f"signal {-code}")
