"""Verbs about a bundle as it lies there: ``inspect``, ``export`` and ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compexport.cli.options import BundlePath, Config, Debug, Json
from compexport.cli.screens import opened_screen


def inspect(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle; with --target, an ONNX file as well.")
    ] = Path("bundle"),
    *,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Check the graphs for a compiler: tensorrt or tensorrt-rtx."),
    ] = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Show what a bundle holds, or whether a compiler would take it.

    With --target: exit code 1 when a graph is expected to be refused. Nothing is built.
    """
    from compexport import api, tables
    from compexport.present import progress

    if target is None:
        with opened_screen(as_json) as screen:
            document = api.inspect(bundle)
        screen.document(document, tables.inspect_tables(document))
        return
    with opened_screen(as_json) as screen, progress() as report:
        document = api.inspect(bundle, target, report)
    screen.document(document, tables.target_tables(document))
    if not document["ok"]:
        raise typer.Exit(1)


def export(
    bundle: BundlePath = Path("bundle"),
    *,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Which one [default: that of ratio 1].")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = Path(
        "exported"
    ),
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Write one variant as a folder that Hugging Face's optimum loads.

    For bundles that read one text and write another: ORTModelForSeq2SeqLM.from_pretrained(DIR). DIR holds its three
    graphs and the weights that they use, without the rest of the family.
    """
    from compexport import api, tables

    with opened_screen(as_json) as screen:
        document = api.export(bundle, output, variant)
    screen.document(document, [tables.export_table(document)])


def verify(
    bundle: BundlePath = Path("bundle"), *, as_json: Json = False, config: Config = None, debug: Debug = False
) -> None:
    """Check every file of a bundle.

    Exit code 1 when one is missing, damaged, unsafe or not listed.
    """
    from compexport import api, tables

    with opened_screen(as_json) as screen:
        document = api.verify(bundle)
    screen.document(document, [tables.verify_table(document)])
    if not document["ok"]:
        raise typer.Exit(1)
