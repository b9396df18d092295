"""Verbs that keep a latency budget: ``select`` and ``run``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compexport.cli.options import (
    Backend,
    BudgetMs,
    BundlePath,
    Config,
    Debug,
    Json,
    MaxNewTokens,
    NumBeams,
    Provider,
    Strict,
    Threads,
)
from compexport.cli.screens import opened_screen
from compexport.cli.typed import numbers_of
from compexport.errors import InputError, TargetMissed, describe


def select(
    bundle: BundlePath = Path("bundle"),
    *,
    budget_ms: BudgetMs = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences in the request.")] = 1,
    length: Annotated[int | None, typer.Option(metavar="N", help="Tokens of the longest one [default: 128].")] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = None,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    strict: Strict = False,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Say which variant would answer, and why.

    Nothing is run: the choice follows from the measured latency and quality of every variant.
    """
    from compexport import api, tables

    with opened_screen(as_json) as screen:
        document = api.select(
            bundle,
            budget_ms=budget_ms,
            batch=batch,
            length=length,
            settings={"max_new_tokens": max_new_tokens, "num_beams": num_beams},
            device=api.Device(backend, provider, threads),
        )
    screen.document(document, [tables.select_table(document)])
    if strict and not document["met_budget"]:
        needed, budget = f"{document['predicted_ms']:.3g} ms", f"at most {budget_ms:g} ms"
        best = document["variant"]
        raise TargetMissed(describe(f"no variant meets the budget, not {best}", got=needed, expected=budget))


def run(
    bundle: BundlePath = Path("bundle"),
    *,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What to answer; may be repeated.")] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Second text of a pair, one for every --text.")
    ] = None,
    budget_ms: BudgetMs = None,
    ratio: Annotated[float | None, typer.Option(metavar="N", help="Use this ratio, whatever the budget.")] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this variant or NAME@POINT, whatever the budget.")
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Leave at exits surer than this: one, or one for each exit but the last."),
    ] = None,
    statistic: Annotated[
        str | None, typer.Option(metavar="NAME", help="What --threshold is of: entropy, max_probability or margin.")
    ] = None,
    exit_mode: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who leaves: per-row, or batch-maximum (all or none).")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Tokens to write, at least, before a text may end.")
    ] = None,
    num_beams: NumBeams = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Texts to give for each, of the beams or drawn [default: 1].")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Of beams: above 0 favours long texts [default: 1].")
    ] = None,
    early_stopping: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Of beams: true, false or never [default: false].")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Above 1 makes what was written less likely [default: 1].")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="No N tokens in a row come twice [default: 0, any may].")
    ] = None,
    encoder_no_repeat_ngram_size: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="No N tokens in a row of the text read are written.")
    ] = None,
    forced_bos_id: Annotated[
        int | None, typer.Option(metavar="ID", min=0, help="The first token written, such as a language's.")
    ] = None,
    forced_eos_id: Annotated[
        int | None, typer.Option(metavar="ID", min=0, help="The last token of a text as long as may be.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Draw tokens at this temperature [default: take the likeliest].")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Draw among the N likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Draw among the likeliest tokens that add up to P.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="What tokens are drawn by, the same way again [default: 0].")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show one text while it is written.")] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate/--no-truncate", help="Cut texts that are too long, or refuse them.")
    ] = True,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    strict: Strict = False,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Answer texts within a latency budget.

    All texts are answered together, by the best variant that is predicted to meet the budget. A variant with exits
    reads the clock between them, and answers from the newest where going on would be too late. A bundle that writes
    text goes on from each of them, or writes another from it, and stops where its next token would be too late.
    """
    from compexport import api, tables

    texts = api.paired(text or [], text_pair)
    thresholds = None if threshold is None else numbers_of("threshold", threshold, "numbers like 0.3")
    settings = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
        "length_penalty": length_penalty,
        "early_stopping": _early_stopping(early_stopping),
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "encoder_no_repeat_ngram_size": encoder_no_repeat_ngram_size,
        "forced_bos_id": forced_bos_id,
        "forced_eos_id": forced_eos_id,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    with opened_screen(as_json) as screen:
        document = api.run(
            bundle,
            texts,
            budget_ms=budget_ms,
            ratio=ratio,
            variant=variant,
            rule=api.exit_rule(thresholds, statistic, exit_mode),
            settings=settings,
            truncate=truncate,
            show=screen.piece if stream else None,
            device=api.Device(backend, provider, threads),
        )
        if stream:
            screen.line("")
    screen.document(document, [tables.run_table(document, text or [])])
    if strict and not document["met_budget"]:
        took, budget = f"{document['latency_ms']:.3g} ms", f"at most {budget_ms:g} ms"
        raise TargetMissed(describe(f"budget missed by {document['variant']}", got=took, expected=budget))


def _early_stopping(word: str | None) -> bool | str | None:
    """``--early-stopping``: a truth value, or the word never."""
    if word is None or word == "never":
        return word
    if word not in ("true", "false"):
        raise InputError(describe("--early-stopping", got=repr(word), expected="true, false or never"))
    return word == "true"
