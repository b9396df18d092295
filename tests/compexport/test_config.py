"""``compexport.toml``: read where it should be, checked against the published schema, beaten by the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compexport import api, config
from compexport.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str, name: str = config.FILE_NAME) -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``compexport build`` asked of the API, instead of building."""
    seen: dict[str, Any] = {}

    def build_document(model: Path, **options: Any) -> dict[str, Any]:
        seen.update(options, model=model)
        return {"bundle": "b", "seconds": 0.0, "variants": []}

    monkeypatch.setattr(api, "build_document", build_document)
    return seen


def test_published_schema_is_current() -> None:
    published = json.loads((ROOT / "docs" / "compexport.schema.json").read_text(encoding="utf-8"))
    assert published == config.schema(), "python -m compexport.config > docs/compexport.schema.json"


def test_schema_knows_every_option_of_every_command() -> None:
    from typer.main import get_command

    from compexport.cli import app

    properties = config.schema()["properties"]
    commands = get_command(app).commands  # type: ignore[attr-defined]
    assert set(properties) == set(commands)
    for name, command in commands.items():
        options = {str(parameter.name).replace("_", "-") for parameter in command.params}
        assert set(properties[name]["properties"]) == options - {"config", "as-json", "debug", "help"}


def test_file_of_the_current_folder_gives_the_defaults(cli: Callable[..., Any], tmp_path: Path, called: Any) -> None:
    write(tmp_path, '[build]\nratio = [2, 8]\noutput = "out"\nuntrained = true\nseed = 7\n')
    assert cli("build", "m").code == 0
    assert called["ratios"] == [2, 8]
    assert (called["output"], called["untrained"], called["fit"].seed) == (Path("out"), True, 7)


def test_arguments_may_be_in_the_file_too(cli: Callable[..., Any], tmp_path: Path, called: Any) -> None:
    write(tmp_path, '[build]\nmodel = "from-file"\n')
    cli("build")
    assert called["model"] == Path("from-file")


@pytest.mark.parametrize("written", ["[2, 4]", '"2,4"', "[2.0, 4]"])
def test_number_lists_may_be_written_in_several_ways(
    cli: Callable[..., Any], tmp_path: Path, called: Any, written: str
) -> None:
    write(tmp_path, f"[build]\nratio = {written}\n")
    cli("build")
    assert called["ratios"] == [2, 4]


def test_command_line_wins(cli: Callable[..., Any], tmp_path: Path, called: Any) -> None:
    write(tmp_path, "[build]\nratio = 2\nseed = 7\n")
    cli("build", "--ratio", "4,8")
    assert (called["ratios"], called["fit"].seed) == ([4, 8], 7)


def test_named_file_is_read_instead(cli: Callable[..., Any], tmp_path: Path, called: Any) -> None:
    write(tmp_path, "[build]\nseed = 1\nratio = 2\n")
    other = write(tmp_path, "[build]\nseed = 2\n", "other.toml")
    cli("build", "--config", other)
    assert (called["fit"].seed, called["ratios"]) == (2, None)


def test_tables_of_other_commands_do_not_matter_but_are_checked(
    cli: Callable[..., Any], tmp_path: Path, called: Any
) -> None:
    write(tmp_path, "[run]\nbudget-ms = 5\n")
    assert cli("build").code == 0
    write(tmp_path, "[run]\nbudget-ms = true\n")
    assert cli("build").code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[build]\nrato = 2\n", "[build] has an unknown option: got rato; did you mean ratio?"),
        ("[bulid]\nratio = 2\n", "unknown table: got [bulid]; did you mean [build]?"),
        ("[zzz]\n", "unknown table: got [zzz], expected one of bench, build, demo"),
        ("[build]\nqqqq = 2\n", "[build] has an unknown option: got qqqq, expected one of assemblies, backend"),
        ("[build]\nratio = true\n", "[build] ratio: got true, expected a number or a string or a list, each a number"),
        ("[build]\nseed = 1.5\n", "[build] seed: got 1.5, expected a whole number"),
        ("[build]\nseed = true\n", "[build] seed: got true, expected a whole number"),
        ("[build]\nuntrained = 1\n", "[build] untrained: got 1, expected true or false"),
        ('[run]\nbudget-ms = "5"\n', '[run] budget-ms: got "5", expected a number'),
        ("[run]\ntext = [1]\n", "[run] text: got [1], expected a string or a list, each a string"),
        ("[build]\njson = true\n", "[build] has an unknown option: got json"),
        ("build = 3\n", "build: got 3, expected a table, [build]"),
        ("[build\n", "not valid TOML"),
    ],
)
def test_wrong_file_is_one_line_and_nothing_runs(
    cli: Callable[..., Any], tmp_path: Path, called: Any, text: str, message: str
) -> None:
    write(tmp_path, text)
    done = cli("build")
    assert done.code == 2
    assert message in done.error
    assert config.FILE_NAME in done.error
    assert not called


def test_missing_named_file(cli: Callable[..., Any], called: Any) -> None:
    done = cli("build", "--config", "nowhere.toml")
    assert done.code == 2
    assert done.error == "--config names no file: got nowhere.toml, expected a TOML file"


def test_not_text(tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not valid TOML"):
        config.read(path)
