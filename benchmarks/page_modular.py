"""The page's tables of modular models: what assemblies lose, and how fast they write."""

from __future__ import annotations

from benchmarks.page import NOT_MEASURED, Result, environment_line, load, measured, table
from benchmarks.traffic import bytes_ceiling

FORMS = {
    "base": "the base",
    "size-first": "assembly, size-first",
    "speed-first": "assembly, speed-first",
    "scratch": "from random weights",
    "shrink": "shrunk and fine-tuned",
}
SCORES = {"word_error_rate": "word error rate", "phoneme_error_rate": "phoneme error rate", "bleu": "BLEU"}


def assemblies_table() -> list[str]:
    """Quality of one task's assemblies beside other models of as many layers, a table for every task."""
    lines = []
    for task, result in _assembled().items():
        scores = {name: title for name, title in SCORES.items() if name in result["rows"][0]}
        rows = [
            (
                FORMS[row["form"]],
                f"{row['ratio']:g}",
                f"{len(row['encoder'])} + {len(row['decoder'])}",
                f"{row['params'] / 1e6:.2f} M",
                *(f"{row[name]:.3f}" if row[name] < 1 else f"{row[name]:.1f}" for name in scores),
                f"{row['relative_loss']:.1%}",
            )
            for row in result["rows"]
        ]
        lost = "BLEU lost" if "bleu" in scores else "right words lost"
        header = [task, "times fewer layers", "layers", "parameters", *scores.values(), lost]
        lines += [*table(header, rows), ""]
    return lines[:-1] or [NOT_MEASURED]


def assemblies_notes() -> list[str]:
    """How the models were trained."""
    lines = []
    for task, result in _assembled().items():
        recipe, steps = result["recipe"], result["train"]["steps"]
        base, modules, size = recipe["base"], recipe["modules"], recipe["size"]
        lines.append(
            f"- {task}: {size['encoder']} + {size['decoder']} layers of width {size['hidden']}; the base and each model"
            f" from random weights {base['epochs']:g} epochs, all modules together {modules['epochs']:g} ({steps}"
            f" steps), each shrunk model as many on top of the base's own; the base was trained no further, so where a"
            f" shrunk model beats it, that is the longer training. Batches of {base['batch_size']}."
            f" Whole outputs of {result['n']} dev rows, greedily."
        )
        lines += environment_line(f"modular_{task}")
    return lines


def writing_table() -> list[str]:
    """Time of a whole output, against PyTorch, against optimum, and against what fewer layers should gain."""
    if not measured("seq2seq"):
        return [NOT_MEASURED]
    result = load("seq2seq")
    rows = [
        (
            f"{row['model']}, batch {row['batch']}",
            f"{row['ratio']:g}",
            f"{row['engines_ms']:.0f}",
            f"{row['tokens_per_second']:.0f}",
            *(f"{row[name]:.2f}" if name in row else "" for name in ("times_pytorch", "times_optimum")),
            f"{row['ceiling']:.2f}",
            _bytes_ceiling(result, row),
            *(f"{row[name]:.2f}" for name in ("speedup", "realised")),
        )
        for row in result["rows"]
    ]
    header = ["model", "times fewer layers", "ms", "tokens/s", "PyTorch / ours", "optimum / ours", "FLOPs ceiling"]
    return table([*header, "bytes ceiling", "measured speed-up", "realised"], rows)


def _bytes_ceiling(result: Result, row: Result) -> str:
    """At batch 1; counted here of a record that holds the sizes alone."""
    if row["batch"] != 1:
        return ""
    counted = row.get("bytes_ceiling") or bytes_ceiling(result["models"][row["model"]], row["ratio"], result["tokens"])
    return f"{counted:.2f}"


def writing_notes() -> list[str]:
    """What was written, and where."""
    if not measured("seq2seq"):
        return []
    result = load("seq2seq")
    same = [row[name] for row in result["rows"] for name in ("same_as_pytorch", "same_as_optimum") if name in row]
    return [
        f"{result['tokens']} tokens, greedily, from texts of {result['source']} tokens, random weights; the least share"
        f" of tokens that another program chose alike: {min(same):.0%}.",
        "",
        *environment_line("seq2seq"),
    ]


def _assembled() -> dict[str, Result]:
    """The results of the tasks whose models were assembled."""
    names = [task for task in ("cmudict", "multi30k") if measured(f"modular_{task}")]
    return {task: load(f"modular_{task}") for task in names}
