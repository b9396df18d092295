"""The command line: one function per verb, each parses, calls ``compexport.api`` or ``compexport.training`` and prints.

A command's function parameters are its options; ``compexport.toml`` takes its keys and types from them too. Nothing
heavy is imported before a command runs, so ``--help`` stays quick.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from compexport.cli.answering import run, select
from compexport.cli.building import build
from compexport.cli.bundles import export, inspect, verify
from compexport.cli.endings import report
from compexport.cli.fitting import import_, train
from compexport.cli.measuring import bench, evaluate
from compexport.cli.showing import demo

app = typer.Typer(
    name="compexport",
    help="One trained Transformer in, a family of engines out, and a runtime that keeps a latency budget.",
    add_completion=False,
    rich_markup_mode=None,  # plain help pages: rich would cost a third of the time to show one
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from compexport import __version__

        typer.echo(f"compexport {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    pass


# In the order of the help page.
for _verb in (train, import_, build, bench, evaluate, select, run, inspect, export, verify, demo):
    app.command(_verb.__name__.rstrip("_"))(_verb)


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 bad input, 3 target missed, 130 interrupted."""
    given = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        code = app(given, prog_name="compexport", standalone_mode=False)
    except BaseException as error:
        if "--debug" in given and not isinstance(error, SystemExit):
            raise
        return report(error)
    if code == 130:  # typer turns Ctrl-C into this exit code
        return report(KeyboardInterrupt())
    return code if isinstance(code, int) else 0
