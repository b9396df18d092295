"""How long do ``import compexport`` and ``compexport --help`` take?

    python -m benchmarks.startup [--runs 20] [--out FILE]

Whole processes, in turn with an empty ``python -c pass``, whose time is recorded beside them and not subtracted. Exit
code 3 when a target is missed (import <= 100 ms over an empty interpreter, help <= 300 ms in all).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from benchmarks.record import command_line, save
from engines.measure import environment, interleave

IMPORT_TARGET_MS, HELP_TARGET_MS = 100.0, 300.0


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "startup")
    parser.add_argument("--runs", type=int, default=20)
    options = parser.parse_args(arguments)
    commands = {
        "empty interpreter": [sys.executable, "-c", "pass"],
        "import compexport": [sys.executable, "-c", "import compexport"],
        "compexport --help": [str(Path(sys.executable).with_name("compexport")), "--help"],
    }
    calls: dict[str, Callable[[], object]] = {
        name: partial(subprocess.run, command, check=True, capture_output=True) for name, command in commands.items()
    }
    timings = interleave(calls, min_runs=options.runs)
    result = {"environment": environment(), "timings": {name: asdict(t) for name, t in timings.items()}}
    save(options.out, result)
    print(json.dumps(result, indent=1))
    added = timings["import compexport"].p50_ms - timings["empty interpreter"].p50_ms
    return 0 if added <= IMPORT_TARGET_MS and timings["compexport --help"].p50_ms <= HELP_TARGET_MS else 3


if __name__ == "__main__":
    sys.exit(main())
