"""The verb ``demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compexport.cli.options import Config, Debug, Json, Seed
from compexport.cli.screens import opened_screen


def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path("demo"),
    fast: Annotated[bool, typer.Option("--fast", help="Three minutes instead of six, with rougher plugins.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Show all of it on a real model.

    Fits, builds, measures and runs a sentence-embedding model (MiniLM), and writes a one-page report.
    """
    from compexport.demo import run_demo

    with opened_screen(as_json) as screen:
        document = run_demo(output, fast=fast, seed=seed, screen=screen)
    screen.document(document)
