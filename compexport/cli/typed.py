"""What was typed and what stands in the configuration file; and lists of numbers, as text."""

from __future__ import annotations

from typing import TypeVar

import typer

from compexport.errors import InputError, describe

Value = TypeVar("Value")


def is_of_file(context: typer.Context, name: str) -> bool:
    """Whether a value stands in the configuration file, and was not typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


def require_alone(context: typer.Context, option: str) -> None:
    """InputError for anything typed beside an option that leaves it no meaning, but for how to print."""
    allowed = {option, "as_json", "config", "debug"}
    typed = [name for name in context.params if is_typed(context, name) and name not in allowed]
    if typed:
        named = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise InputError(describe(f"--{option.replace('_', '-')} goes with no other option", got=named))


def is_typed(context: typer.Context, name: str) -> bool:
    """Whether a value was typed, and does not stand in the configuration file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def own_value(context: typer.Context, foreign: set[str], name: str, value: Value, default: Value) -> Value:
    """An option's value; what the file, one for all methods, says for another method is not meant for this one."""
    return default if name in foreign and is_of_file(context, name) else value


def numbers_of(option: str, text: str, wanted: str = "numbers like 2,4,8") -> list[float]:
    """``"2,4,8"`` as numbers; InputError names the part that is none. What the numbers must be is the API's to say."""
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            raise InputError(describe(f"--{option} is not a number", got=repr(part.strip()), expected=wanted)) from None
    return numbers
