"""Help pages are text that people read: kept in ``help/``. Run this file as a module to write them anew."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
COMMANDS = ["train", "import", "build", "bench", "evaluate", "select", "run", "inspect", "export", "verify", "demo"]


def help_page(command: str | None) -> str:
    arguments = [*([command] if command else []), "--help"]
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "compexport", *arguments], capture_output=True, text=True, env=environment, check=True
    )
    assert not done.stderr
    return done.stdout


def page_file(command: str | None) -> Path:
    return HERE / "help" / f"{command or 'compexport'}.txt"


@pytest.mark.parametrize("command", [None, *COMMANDS])
def test_help_page(command: str | None) -> None:
    written = page_file(command).read_text(encoding="utf-8")
    assert help_page(command) == written, "changed on purpose? python -m tests.compexport.test_cli_help"


def test_help_names_every_command() -> None:
    listed = [line.split()[0] for line in help_page(None).split("Commands:\n")[1].splitlines() if line.strip()]
    assert listed == COMMANDS


if __name__ == "__main__":
    for name in [None, *COMMANDS]:
        page_file(name).parent.mkdir(exist_ok=True)
        page_file(name).write_text(help_page(name), encoding="utf-8")
