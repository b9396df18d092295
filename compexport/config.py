"""``compexport.toml``: any option of any command, in one table per command. The command line wins over it.

    [build]
    ratio = [2, 4, 8]
    data = "texts.txt"

The allowed keys and their types come from the commands themselves; ``python -m compexport.config`` prints them as the
JSON schema published in ``docs/compexport.schema.json``.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

from compexport.errors import InputError, describe

FILE_NAME = "compexport.toml"

# Options that make no sense in a file: they steer one call, or name the file itself.
_NOT_IN_FILE = {"config", "as_json", "debug", "context"}
# Options that take several numbers, "2,4,8" on the command line and [2, 4, 8] in the file.
NUMBER_LISTS = {"ratio", "batch", "length", "exits", "threshold", "steps", "granularities"}


def find(given: Path | None) -> Path | None:
    """The file to read: the one named by ``--config``, else ``compexport.toml`` of the current folder, else none."""
    if given is not None:
        if not given.is_file():
            raise InputError(describe("--config names no file", got=given, expected="a TOML file"))
        return given
    here = Path(FILE_NAME)
    return here if here.is_file() else None


def read(path: Path) -> dict[str, dict[str, Any]]:
    """All tables of the file, checked against the schema, as option values keyed by parameter name."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(describe(f"{path}: not valid TOML", got=error)) from error
    except OSError as error:
        raise InputError(describe(f"{path}: cannot be read", got=error.strerror)) from error
    known = schema()["properties"]
    for command, options in tables.items():
        _check_key(command, known, f"{path}: unknown table", form="[{}]")
        _check_table(path, command, options, known[command]["properties"])
    return {
        command: {
            key.replace("-", "_"): _as_argument(key, value, known[command]["properties"][key])
            for key, value in options.items()
        }
        for command, options in tables.items()
    }


def _check_table(path: Path, command: str, options: object, known: Mapping[str, Any]) -> None:
    if not isinstance(options, dict):
        raise InputError(describe(f"{path}: {command}", got=json.dumps(options), expected=f"a table, [{command}]"))
    for key, value in options.items():
        _check_key(key, known, f"{path}: [{command}] has an unknown option", form="{}")
        if not _fits(value, known[key]):
            expected = _expectation(known[key])
            raise InputError(
                describe(f"{path}: [{command}] {key}", got=json.dumps(value, default=str), expected=expected)
            )


def _check_key(key: str, known: Mapping[str, Any], what: str, *, form: str) -> None:
    if key in known:
        return
    near = difflib.get_close_matches(key.replace("_", "-"), known, n=1)
    hint = f"did you mean {form.format(near[0])}?" if near else ""
    choices = None if near else "one of " + ", ".join(sorted(known))
    raise InputError(describe(what, got=form.format(key), expected=choices, hint=hint))


def _as_argument(key: str, value: Any, rule: Mapping[str, Any]) -> Any:
    """A value as the command's parser takes it: number lists with commas, a single text as a list of one."""
    if "anyOf" not in rule:
        return value
    listed = value if isinstance(value, list) else [value]
    if key not in NUMBER_LISTS:
        return listed
    return ",".join(item if isinstance(item, str) else f"{item:g}" for item in listed)


# --- the schema ----------------------------------------------------------------------------------------------------

_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
}


def schema() -> dict[str, Any]:
    """The JSON schema of the file, from the options of the commands."""
    from compexport.cli import app

    functions = {
        command.name or command.callback.__name__: command.callback
        for command in app.registered_commands
        if command.callback is not None
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FILE_NAME,
        "description": "Options of the compexport commands, one table per command; the command line wins.",
        "type": "object",
        "additionalProperties": False,
        "properties": {name: _table_schema(function) for name, function in functions.items()},
    }


def _table_schema(command: Callable[..., Any]) -> dict[str, Any]:
    """The options are the command function's own parameters, annotated with their help."""
    hints = get_type_hints(command, include_extras=True)
    options = {
        name.replace("_", "-"): _option_schema(name, hint)
        for name, hint in sorted(hints.items())
        if name not in {"return", *_NOT_IN_FILE}
    }
    described = (command.__doc__ or "").split("\n")[0]
    return {"description": described, "type": "object", "additionalProperties": False, "properties": options}


def _option_schema(name: str, hint: Any) -> dict[str, Any]:
    kind, parameter = get_args(hint)[:2]
    described = {"description": parameter.help} if parameter.help else {}
    kinds = {option for option in (get_args(kind) or (kind,)) if option is not type(None)}
    if name in NUMBER_LISTS and str in kinds:  # the steps of a training are one number
        number = {"type": "number"}
        return {**described, "anyOf": [number, {"type": "string"}, {"type": "array", "items": number}]}
    if list[str] in kinds:
        text = {"type": "string"}
        return {**described, "anyOf": [text, {"type": "array", "items": text}]}
    names = {bool: "boolean", int: "integer", float: "number"}
    return {**described, "type": next((name for type_, name in names.items() if type_ in kinds), "string")}


def _fits(value: object, rule: Mapping[str, Any]) -> bool:
    """Whether ``value`` fits a rule of the kinds that ``schema`` makes."""
    if "anyOf" in rule:
        return any(_fits(value, option) for option in rule["anyOf"])
    if isinstance(value, bool) and rule["type"] != "boolean":
        return False
    if not isinstance(value, _TYPES[rule["type"]]):
        return False
    return not isinstance(value, list) or all(_fits(item, rule["items"]) for item in value)


def _expectation(rule: Mapping[str, Any]) -> str:
    if "anyOf" in rule:
        return " or ".join(_expectation(option) for option in rule["anyOf"])
    if rule["type"] == "array":
        return f"a list, each {_expectation(rule['items'])}"
    return {"integer": "a whole number", "number": "a number", "boolean": "true or false"}.get(rule["type"], "a string")


if __name__ == "__main__":
    print(json.dumps(schema(), indent=2))
