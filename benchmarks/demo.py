"""Does the demo keep its minutes, and how good are the plugins it fits meanwhile?

    python -m benchmarks.demo [--fast] [--out FILE]

Runs ``compexport demo`` in a fresh process. Exit code 3 when a target is missed: 360 s in all (180 s with ``--fast``),
and, without ``--fast``, mean cosines of at least 0.95, 0.88 and 0.80 for k = 2, 4, 8.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.record import command_line, save
from engines.measure import environment

SECONDS = {False: 360.0, True: 180.0}
COSINES = {2: 0.95, 4: 0.88, 8: 0.80}


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "demo")
    parser.add_argument("--fast", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "compexport", "demo", "--json", "-o", str(Path(folder) / "demo")]
        done = subprocess.run([*command, *(["--fast"] * options.fast)], check=True, stdout=subprocess.PIPE, text=True)
    result = record(json.loads(done.stdout))
    save(options.out, result)
    print(json.dumps({"seconds": result["seconds"], "evaluate": result["evaluate"]}, indent=1))
    return 3 if missed(result, options.fast) else 0


def record(document: dict[str, Any]) -> dict[str, Any]:
    """What is kept of the demo's document."""
    train = {key: value for key, value in document["train"].items() if key != "output"}
    return {
        "environment": environment(),
        "seconds": document["seconds"],
        "train": train,
        "evaluate": document["evaluate"],
        "realised": document["bench"]["realised"],
    }


def missed(result: dict[str, Any], fast: bool) -> bool:
    """Whether a target was missed."""
    values = {row["variant"]: row["value"] for row in result["evaluate"]["variants"]}
    poor = [k for k, target in COSINES.items() if values[f"variator-r{k}-fp32"] < target]
    return result["seconds"] > SECONDS[fast] or (bool(poor) and not fast)


if __name__ == "__main__":
    sys.exit(main())
