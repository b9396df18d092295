"""The other end of ``trt_build``: starts the process that builds a plan, follows it, stops it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from compexport.errors import CompexportError, InputError, describe
from engines.backends.trt_build import Built, Request

_ROOT = Path(__file__).resolve().parents[2]
_GRACE_S = 15.0
_LINE = 1 << 16  # characters of a request, or a multiple
_KEPT = ("PATH", "HOME", "TMP", "TEMP", "SYSTEMROOT", "LANG", "LC_", "LD_", "CUDA_", "NVIDIA_", "TRT_")


class PlanProcess:
    """One build. ``stage`` and ``share`` (0 to 1) say how far it is; ``run`` waits for it, ``cancel`` stops it."""

    def __init__(self, request: Request, title: str) -> None:
        """``title``: library and version, for messages."""
        self.stage, self.share = "starting", 0.0
        self._request, self._title = request, title
        self._name = Path(request.graph).name
        self._process: subprocess.Popen[str] | None = None
        self._cancelled = False

    def run(self) -> Built:
        """Build; raises CompexportError, one line, for whatever goes wrong, a compiler that dies included."""
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            self._process = process = subprocess.Popen(
                [sys.executable, "-P", "-m", "engines.backends.trt_build"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                text=True,
                cwd=Path(self._request.graph).parent,
                env=_environment(),
                start_new_session=True,  # Ctrl-C reaches this process only, which then cancels the build
            )
            try:
                return self._follow(process, said)
            finally:
                self._end(process)

    def cancel(self) -> None:
        """Stop: the end of its input tells the process, which stops at the next step; else it is killed."""
        self._cancelled = True
        process = self._process
        if process is None:
            return
        if process.stdin is not None:
            with contextlib.suppress(OSError):  # it may be dead already, with its request not read
                process.stdin.close()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()

    def _follow(self, process: subprocess.Popen[str], said: IO[str]) -> Built:
        assert process.stdin is not None and process.stdout is not None
        if self._cancelled:
            raise self._error("cancelled")
        with contextlib.suppress(OSError, ValueError):  # it may be dead or cancelled already, which is told below
            process.stdin.write(_line(self._request))
            process.stdin.flush()
        for line in process.stdout:
            event = json.loads(line)
            if "built" in event:
                return Built(**event["built"])
            if "failed" in event:
                raise self._error("cancelled" if event["cancelled"] else event["failed"])
            self.stage, self.share = event["stage"], event["share"]
        code = process.wait()
        if self._cancelled:
            raise self._error("cancelled")
        said.seek(0)
        raise self._error(f"{_death(code)}, after {_last_line(said.read())}")

    def _error(self, reason: str) -> CompexportError:
        return CompexportError(describe(f"{self._name}: {self._title} cannot build it", got=" ".join(reason.split())))

    @staticmethod
    def _end(process: subprocess.Popen[str]) -> None:
        for stream in (process.stdin, process.stdout):
            if stream is not None and not stream.closed:
                with contextlib.suppress(OSError):
                    stream.close()
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def require_targets(module: str, title: str, targets: Sequence[str]) -> None:
    """InputError for a compute capability that the library has no name for, before anything is traced for it.

    The library is asked in a process of its own, which it may take down; what is wrong with it then, the build says.
    """
    code = f"import {module} as trt; print(*(name for name in dir(trt.ComputeCapability) if name.startswith('SM')))"
    asked = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=_environment())
    known = asked.stdout.lower().split()
    wrong = [target for target in targets if target not in known]
    if wrong and asked.returncode == 0:
        listed = ", ".join(sorted(known, key=lambda name: int(name[2:])))
        raise InputError(describe(f"--target: {title} does not know it", got=wrong[0], expected=f"one of {listed}"))


def _line(request: Request) -> str:
    """The request as the process reads it, as long as others: its length moves memory too."""
    text = json.dumps(asdict(_relative(request)))
    return text + " " * (-len(text) % _LINE) + "\n"


def _relative(request: Request) -> Request:
    """With paths as from the graph's folder: lengths of texts move memory, and that what the compiler makes."""
    folder = os.path.dirname(os.path.abspath(request.graph))
    cache = request.timing_cache
    return replace(
        request,
        graph=os.path.basename(request.graph),
        plan=os.path.relpath(request.plan, folder),
        timing_cache=None if cache is None else os.path.relpath(cache, folder),
    )


def _environment() -> dict[str, str]:
    """What the process needs of this one's, for the same reason; our own modules first, wherever they were found.

    Nothing is ever imported from the folder it works in, which is a bundle's.
    """
    path = [os.path.abspath(place) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]
    kept = {name: value for name, value in os.environ.items() if name.startswith(_KEPT)}
    return {**kept, "PYTHONPATH": os.pathsep.join([str(_ROOT), *path])}


def _death(code: int) -> str:
    if code >= 0:
        return f"a compiler process that ended with code {code}"
    try:
        return f"a compiler process that died of {signal.Signals(-code).name}"
    except ValueError:
        return f"a compiler process that died of signal {-code}"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return repr(lines[-1][:200]) if lines else "saying nothing"
