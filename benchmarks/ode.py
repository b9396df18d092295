"""What does a model that shares layers lose in fewer steps, with and without being trained for it?

    python -m benchmarks.ode agnews --data ../shared/data/agnews [--work DIR] [--out FILE] [--quick]

A small ALBERT of N = 12 iterations is trained on the task, ordinarily at first. From there it is trained on twice, as
long and on the same batches: ordinarily again, and with the number of steps drawn anew for every batch (``compexport
train ode``, with ``--plain`` and without). Both are measured on the dev split at n = 12, 6, 4 and 3, in both forms of a
step and with the other iterations plainly dropped. What an earlier run left in ``--work`` is kept: an interrupted
training goes on; remove it to start anew. ``--quick`` takes a few steps of everything, to see that it runs. Exit code 3
when a target is missed: after training for it, at most 1 % lost relative to n = 12 at n = 6, and 3 % at n = 4.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.models import small_albert
from benchmarks.record import command_line, once, save, say, without_paths
from compexport import api, training
from engines.measure import environment

RATIOS = (2, 3, 4)
TARGETS = {6: 0.01, 4: 0.03}
QUICK_ROWS = 65  # of either split, the header counted


@dataclass(frozen=True)
class Recipe:
    """How a task is learnt, on two cores in minutes: ``first`` ordinarily, ``then`` in both ways.

    ``shared``: of the training with drawn numbers of steps.
    """

    first: api.Fit
    then: api.Fit
    shared: api.Shared


def _recipe(first: float, then: float, length: int) -> Recipe:
    """``first`` and ``then`` in epochs, ``length`` in tokens."""
    fit = api.Fit(epochs=first, batch_size=32, learning_rate=1e-3, max_length=length)
    shared = api.Shared(form="sublayer", fewest_steps=3)
    return Recipe(fit, replace(fit, epochs=then, learning_rate=5e-4, seed=1), shared)


RECIPES = {"agnews": _recipe(2, 1, 48), "news20": _recipe(6, 2, 96)}


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "ode_TASK", work=True)
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the result says so")
    options = parser.parse_args(arguments)
    recipe = quick(RECIPES[options.task]) if options.quick else RECIPES[options.task]
    name = f"ode-{options.task}" + ("-quick" if options.quick else "")
    result = measure(options.task, recipe, options.data, options.work / name, quick=options.quick)
    save(Path(str(options.out).replace("TASK", options.task)), result)
    print(json.dumps(result["rows"], indent=1))
    return 3 if missed(result["rows"]) and not options.quick else 0


def quick(recipe: Recipe) -> Recipe:
    """The same with so little of everything that it says nothing about quality."""
    fit = replace(recipe.first, epochs=None, steps=3, batch_size=8, max_length=16)
    return replace(recipe, first=fit, then=fit)


def measure(task: str, recipe: Recipe, data: Path, work: Path, *, quick: bool = False) -> dict[str, Any]:
    """All trainings; ``work`` keeps what each made."""
    work.mkdir(parents=True, exist_ok=True)
    if quick:
        data = _beginning(data, work / "data")
    ordinarily = api.Shared(form=recipe.shared.form, plain=True)
    first = _trained("first", small_albert(work / "start"), recipe.first, ordinarily, data, work)
    trained = {
        name: _trained(name, work / "first", recipe.then, shared, data, work)
        for name, shared in {"ordinary": ordinarily, "randomised": recipe.shared}.items()
    }
    return {
        "question": f"quality in fewer steps on {task}, with and without training for it",
        "environment": environment(),
        "task": task,
        "quick": quick,
        "recipe": asdict(recipe),
        "metric": first["metric"],
        "n": first["held_out"],
        "trained": {name: without_paths(document) for name, document in {"first": first, **trained}.items()},
        "rows": [row for name, document in trained.items() for row in rows_of(name, document)],
    }


def _beginning(data: Path, place: Path) -> Path:
    """The first rows of both splits."""
    place.mkdir(exist_ok=True)
    for name in ("train.tsv", "dev.tsv"):
        lines = (data / name).read_text(encoding="utf-8").splitlines(keepends=True)[:QUICK_ROWS]
        (place / name).write_text("".join(lines), encoding="utf-8")
    if (data / "labels.txt").exists():
        shutil.copy(data / "labels.txt", place)
    return place


def _trained(name: str, model: Path, fit: api.Fit, shared: api.Shared, data: Path, work: Path) -> dict[str, Any]:
    """One training; an interrupted one goes on."""
    return once(
        work / f"{name}.json",
        {"fit": asdict(fit), "shared": asdict(shared)},
        lambda: training.train(
            model,
            data,
            ratios=RATIOS,
            output=work / name,
            method="ode",
            fit=fit,
            shared=shared,
            saving=api.Saving(resume=True),
            progress=say,
        ),
    )


def rows_of(name: str, document: dict[str, Any]) -> list[dict[str, Any]]:
    """One row for each n of a training: the metric in both forms, with the other iterations dropped, and what is lost.

    ``relative_drop`` is that of the form that the recipe names, against n = N of the same model.
    """
    full = document["teacher"]
    first = dict.fromkeys(("value", *document["forms"], "dropped"), full)
    rows = [{"training": name, "n": document["iterations"], **first, "relative_drop": 0.0}]
    for ratio in map(str, document["ratios"]):
        rows.append(
            {
                "training": name,
                "n": document["n"][ratio],
                "value": document["student"][ratio],
                **{form: values[ratio] for form, values in document["forms"].items()},
                "dropped": document["dropped"][ratio],
                "relative_drop": 1.0 - document["student"][ratio] / full if full else 0.0,
            }
        )
    return rows


def missed(rows: list[dict[str, Any]]) -> list[str]:
    """The targets that were missed, in words."""
    return [
        f"n = {row['n']}: lost {row['relative_drop']:.2%}"
        for row in rows
        if row["training"] == "randomised" and row["relative_drop"] > TARGETS.get(row["n"], 1.0)
    ]


if __name__ == "__main__":
    sys.exit(main())
