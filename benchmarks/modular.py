"""What do assemblies of modules cost in quality? Train a base, its modules once, and other models of the same sizes.

    python -m benchmarks.modular cmudict --data ../shared/data/cmudict_g2p [--work DIR] [--out FILE] [--quick]
        [--assemblies-only]
    python -m benchmarks.modular multi30k --data ../shared/data/multi30k_en_de

A T5 (spelling to phonemes) or an mBART (English to German) of 12 + 12 small layers learns its task from random weights;
one run trains its modules. Then whole words or sentences are written for the dev split, greedily, by the base and by
assemblies of 1.5, 2, 3 and 6 times fewer layers, chosen size-first and speed-first. Beside them, at 2, 3 and 6: models
of the size-first assembly's numbers of layers, from random weights with as many steps as the base ("scratch"), and from
evenly spaced layers of the base with as many steps as the modules ("shrink"), each a training of its own. What an
earlier run left in ``--work`` is kept, and an interrupted training goes on; remove it to start anew.
``--assemblies-only`` leaves out the models that are trained on their own, half of the time. ``--quick`` takes a few
steps of everything, to see that it runs.

Exit code 3 when a target is missed: size-first assemblies lose at most 5 % of the base's quality at 2, 10 % at 3 and
20 % at 6. Quality is the share of words that are written as the dictionary has them (1 - word error rate), or BLEU.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks import writers
from benchmarks.record import command_line, once, save, say, without_paths
from benchmarks.writers import Size
from calib.text_scores import bleu, edit_share, wrong_share
from compexport import api, training
from engines.measure import environment

RATIOS = (1.5, 2, 3, 6)
LOSS_TARGETS = {2: 0.05, 3: 0.10, 6: 0.20}
STRATEGIES = ("size-first", "speed-first")
ALONE = ("scratch", "shrink")
WRITTEN_TOGETHER = 128

# (texts, data folder, sources, targets) -> the leading score, higher is better, and others
Score = Callable[[Sequence[str], Path, Sequence[str], Sequence[str]], dict[str, float]]


def word_scores(texts: Sequence[str], data: Path, sources: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Against all pronunciations that the dictionary has of a word."""
    accepted: dict[str, list[str]] = {}
    for source, target in [*zip(sources, targets, strict=True), *read_pairs(data / "dev.variants.tsv")]:
        accepted.setdefault(source, []).append(target)
    fine = [accepted[source] for source in sources]
    wrong = wrong_share(texts, fine)
    return {"word_accuracy": 1.0 - wrong, "word_error_rate": wrong, "phoneme_error_rate": edit_share(texts, fine)}


def bleu_scores(texts: Sequence[str], data: Path, sources: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    return {"bleu": bleu(texts, targets)}


@dataclass(frozen=True)
class Recipe:
    """How a task's models are made, trained and measured; ``rows`` of training and dev data, None for all."""

    model: Callable[[int, Size], Any]
    tokenizer: Callable[[Sequence[tuple[str, str]]], Any]
    score: Score
    size: Size
    base: api.Fit
    modules: api.Fit
    max_new_tokens: int
    rows: int | None = None
    dev_rows: int | None = None

    def document(self) -> dict[str, Any]:
        """As JSON holds it."""
        functions = {name: getattr(self, name).__name__ for name in ("model", "tokenizer", "score")}
        return {**asdict(self), **functions}


RECIPES = {
    "cmudict": Recipe(
        model=writers.t5,
        tokenizer=writers.spelling_tokenizer,
        score=word_scores,
        size=Size(hidden=64, ffn=256),
        base=api.Fit(epochs=3, batch_size=128, learning_rate=2e-3, max_length=writers.MAX_LENGTH),
        modules=api.Fit(epochs=8, batch_size=128, learning_rate=3e-3, max_length=writers.MAX_LENGTH),
        max_new_tokens=28,
    ),
    "multi30k": Recipe(
        model=writers.mbart,
        tokenizer=writers.translation_tokenizer,
        score=bleu_scores,
        size=Size(hidden=128, ffn=256),
        base=api.Fit(epochs=7, batch_size=64, learning_rate=1e-3, max_length=writers.MAX_LENGTH),
        modules=api.Fit(epochs=8, batch_size=64, learning_rate=2e-3, max_length=writers.MAX_LENGTH),
        max_new_tokens=48,
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, "modular_TASK", work=True)
    parser.add_argument("task", choices=RECIPES)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.tsv and dev.tsv")
    parser.add_argument("--quick", action="store_true", help="a few steps of everything; the result says so")
    parser.add_argument("--assemblies-only", action="store_true", help="without the models trained on their own")
    options = parser.parse_args(arguments)
    recipe = quick(RECIPES[options.task]) if options.quick else RECIPES[options.task]
    name = f"modular-{options.task}" + ("-quick" if options.quick else "")
    forms = () if options.assemblies_only else ALONE
    result = measure(options.task, recipe, options.data, options.work / name, forms, quick=options.quick)
    save(Path(str(options.out).replace("TASK", options.task)), result)
    print(json.dumps(result["rows"], indent=1))
    return 0 if options.quick or not missed(result["rows"]) else 3


def quick(recipe: Recipe) -> Recipe:
    """The same with so little of everything that it says nothing about quality."""
    few = {"epochs": None, "steps": 2, "batch_size": 8}
    return replace(
        recipe,
        size=replace(recipe.size, encoder=6, decoder=6, hidden=16, ffn=16, heads=2),
        base=replace(recipe.base, **few),  # type: ignore[arg-type]
        modules=replace(recipe.modules, **few),  # type: ignore[arg-type]
        rows=60,
        dev_rows=6,
        max_new_tokens=4,
    )


def read_pairs(file: Path) -> list[tuple[str, str]]:
    """The rows of a tsv with the columns source and target."""
    rows = [line.split("\t") for line in file.read_text(encoding="utf-8").splitlines()[1:]]
    return [(source, target) for source, target in rows]


def measure(
    task: str, recipe: Recipe, data: Path, work: Path, forms: Sequence[str], *, quick: bool = False
) -> dict[str, Any]:
    """All trainings, one after the other, and what their models write; ``work`` keeps what each command made.

    ``forms``: of the models that are trained on their own.
    """
    parts = part_of(data, work / "data", recipe)
    bench = Bench(recipe, parts, data, work)
    base = bench.trained("base", work / "base", lambda folder: bench.fresh(folder, recipe.size), recipe.base)
    modules = bench.modules()
    rows = [*bench.rows(), *bench.alone(forms)]
    return {
        "question": f"quality of assemblies on {task}",
        "environment": environment(),
        "task": task,
        "quick": quick,
        "recipe": recipe.document(),
        "base": without_paths(base),
        "train": without_paths(modules),
        "n": len(read_pairs(parts / "dev.tsv")),
        "rows": relative(rows),
    }


def part_of(data: Path, parts: Path, recipe: Recipe) -> Path:
    """The data, or a folder with the first rows of them."""
    if recipe.rows is None and recipe.dev_rows is None:
        return data
    parts.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", recipe.rows), ("dev", recipe.dev_rows)):
        header, *lines = (data / f"{name}.tsv").read_text(encoding="utf-8").splitlines()
        (parts / f"{name}.tsv").write_text("\n".join([header, *lines[:rows]]) + "\n", encoding="utf-8")
    return parts


@dataclass(frozen=True)
class Bench:
    """One task's models in a work folder. ``data``: what is trained on; ``original``: the folder it is part of."""

    recipe: Recipe
    data: Path
    original: Path
    work: Path

    # --- training

    def fresh(self, folder: Path, size: Size) -> Path:
        """A model of random weights."""
        recipe = self.recipe
        return writers.make(folder, recipe.model, recipe.tokenizer, read_pairs(self.data / "train.tsv"), size)

    def shrunk(self, folder: Path, size: Size) -> Path:
        """A model of some of the base's layers."""
        return writers.shrunk(self.work / "base", folder, self.recipe.model, size)

    def trained(self, name: str, output: Path, start: Callable[[Path], Path], fit: api.Fit) -> dict[str, Any]:
        """Fine-tune what ``start`` makes, unless an earlier run has."""

        def work() -> dict[str, Any]:
            say(f"=== {name}")
            folder = self.work / "start" / name
            model = folder if (folder / "tokenizer_config.json").exists() else start(folder)
            saving = api.Saving(resume=True)
            return training.train(
                model, self.data, output=output, method="finetune", fit=fit, saving=saving, progress=say
            )

        return once(self.work / f"{name}.json", {"recipe": self.recipe.document(), "fit": asdict(fit)}, work)

    def modules(self) -> dict[str, Any]:
        """Train the modules."""

        def work() -> dict[str, Any]:
            say("=== modules")
            return training.train(
                self.work / "base",
                self.data,
                ratios=RATIOS,
                output=self.work / "modules",
                method="modular",
                fit=self.recipe.modules,
                modules=api.Modules(strategy="size-first"),
                saving=api.Saving(resume=True),
                progress=say,
            )

        return once(self.work / "modules.json", {"recipe": self.recipe.document()}, work)

    # --- measuring

    def rows(self) -> Iterator[dict[str, Any]]:
        """One row for the base and every assembly: its form, its layers, and its scores."""
        from exporter.methods.assembly import Assembly, assembly_for_ratio
        from exporter.methods.modular_checkpoint import load_modular

        modular = load_modular(self.work / "modules")
        base = Assembly.base(modular.facts)
        yield self.row("base", 1, base, modular.assemble(base), modular.source)
        for strategy in STRATEGIES:
            for ratio in RATIOS:
                assembly = assembly_for_ratio(modular.facts, ratio, strategy)
                yield self.row(strategy, ratio, assembly, modular.assemble(assembly), modular.source)

    def alone(self, forms: Sequence[str]) -> Iterator[dict[str, Any]]:
        """The same for models of the size-first assemblies' numbers of layers, each trained on its own."""
        from exporter.backbone import load_seq2seq
        from exporter.checkpoint import find_checkpoint
        from exporter.methods.assembly import Assembly, assembly_for_ratio
        from exporter.methods.modular_settings import METHOD, ModularSettings

        ways = {"scratch": (self.fresh, self.recipe.base), "shrink": (self.shrunk, self.recipe.modules)}
        checkpoint = find_checkpoint(self.work / "modules", METHOD)
        assert checkpoint is not None, "the modules were trained before"
        facts = ModularSettings.of(checkpoint).facts
        for form in forms:
            start, fit = ways[form]
            for ratio in LOSS_TARGETS:
                assembly = assembly_for_ratio(facts, ratio, "size-first")
                size = replace(self.recipe.size, encoder=len(assembly.encoder), decoder=len(assembly.decoder))
                name = f"{form}-{ratio}"
                self.trained(name, self.work / name, lambda folder, make=start, of=size: make(folder, of), fit)  # type: ignore[misc]
                source = load_seq2seq(self.work / name)
                plain = Assembly((1,) * size.encoder, (1,) * size.decoder)
                yield self.row(form, ratio, plain, source.model, source)

    def row(self, form: str, ratio: float, assembly: Any, model: Any, source: Any) -> dict[str, Any]:
        """What one model is, and how good what it writes; not written again where an earlier run has."""
        from calib.writers import write

        def work() -> dict[str, Any]:
            pairs = read_pairs(self.data / "dev.tsv")
            sources, targets = [one for one, _ in pairs], [one for _, one in pairs]
            say(f"{form} {ratio:g}: writing {len(pairs)} texts")
            texts = write(model, source, sources, size=WRITTEN_TOGETHER, max_new_tokens=self.recipe.max_new_tokens)
            return {
                "form": form,
                "ratio": ratio,
                **assembly.document(),
                "layers": assembly.layers,
                "params": sum(one.numel() for one in model.parameters()),
                **self.recipe.score(texts, self.original, sources, targets),
            }

        return once(self.work / f"row-{form}-{ratio:g}.json", {"recipe": self.recipe.document()}, work)


def relative(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with what each loses of the base's leading score, and of words that are wrong what it adds."""
    base = rows[0]
    metric = "word_accuracy" if "word_accuracy" in base else "bleu"
    made = []
    for row in rows:
        lost = 1.0 - row[metric] / base[metric] if base[metric] else 0.0
        more = {"relative_loss": lost}
        if base.get("word_error_rate"):
            more["relative_error_rise"] = row["word_error_rate"] / base["word_error_rate"] - 1.0
        made.append({**row, **more})
    return made


def missed(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The targets that size-first assemblies miss, in words."""
    return [
        f"{row['ratio']:g} times fewer layers: {row['relative_loss']:.3f}"
        for row in rows
        if row["form"] == "size-first" and row["relative_loss"] > LOSS_TARGETS.get(row["ratio"], 1.0)
    ]


if __name__ == "__main__":
    sys.exit(main())
