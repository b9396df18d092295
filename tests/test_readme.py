"""Commands in the documentation are commands that exist, with options that exist; links lead somewhere."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from compexport.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def commands(text: str) -> list[str]:
    """``compexport ...`` in code spans and at the start of lines of code blocks, without trailing remarks."""
    spans = re.findall(r"`(compexport [a-z][^`]*)`", text)
    blocks = re.findall(r"^(?:    |\$ )?(compexport [a-z][^\n]*)$", text, flags=re.MULTILINE)
    return [command.split("  #")[0].strip() for command in [*spans, *blocks]]


def cases() -> list[tuple[str, str]]:
    return [(page.name, command) for page in PAGES for command in commands(page.read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "command"), cases())
def test_documented_command_parses(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where no compexport.toml is
    # "[-o BUNDLE]" says that an option may be left out; "..." stands for more.
    _, name, *arguments = shlex.split(re.sub(r"\[|\](?!\w)|…", "", command))
    assert name in COMMANDS, f"{page} names an unknown command"
    if COMMANDS[name].params[0].required or arguments:
        COMMANDS[name].make_context(name, arguments)


def test_readme_has_commands() -> None:
    named = {command.split()[1] for page, command in cases() if page == "README.md"}
    assert named == set(COMMANDS)


def test_readme_opens_with_the_two_commands() -> None:
    first = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:6]
    assert [line.split("#")[0].strip() for line in first if line.startswith("    make")] == ["make demo", "make test"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_are_python_and_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        ast.parse(block)
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
