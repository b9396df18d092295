"""Tables of ``select`` and ``run``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compexport.present import Table, cell


def select_table(document: Mapping[str, Any]) -> Table:
    """``select``: all candidates, with the reason each won or lost."""
    writes = "expected_tokens" in document
    columns = ("candidate", *(["usual ms"] if writes else []), "predicted ms", "quality", "verdict")
    names = ("variant", *(["usual_ms"] if writes else []), "predicted_ms", "quality", "verdict")
    rows = [tuple(row[name] for name in names) for row in document["candidates"]]
    met = "" if document["met_budget"] else " (budget not met)"
    title = f"{document['variant']}: {cell(document['predicted_ms'])} ms predicted{met}: {document['reason']}"
    return Table(title, columns, rows)


def run_table(document: Mapping[str, Any], texts: Sequence[str]) -> Table:
    """``run``: one answer per text."""
    rows = [
        (text if len(text) <= 60 else text[:57] + "...", answer_text(output))
        for text, output in zip(texts, document["outputs"], strict=True)
    ]
    predicted = f", {cell(document['predicted_ms'])} ms predicted" if document["predicted_ms"] is not None else ""
    met = "" if document["met_budget"] in (True, None) else " (budget not met)"
    title = f"{document['variant']}: {cell(document['latency_ms'])} ms{predicted}{met}"
    return Table(title, ("text", "answer"), rows)


# Why a text ends, where the word alone would not say it.
_WHY = {"budget": "stopped to keep the budget"}


def answer_text(output: Mapping[str, Any]) -> str:
    """One output of ``run`` in a few words."""
    if "text" in output:
        score = f", score {output['score']:.3f}" if "score" in output else ""
        count = len(output["tokens"])
        tokens = f"{count} token{'' if count == 1 else 's'}"
        shown = f"{output['text']!r} ({tokens}, {_WHY.get(output['why'], output['why'])}{score})"
        return "; ".join((shown, *map(answer_text, output.get("others", ()))))
    if "embedding" in output:
        values = output["embedding"]
        return f"[{', '.join(f'{x:.3f}' for x in values[:4])}, ...] {len(values)} values"
    if "answer" in output:
        return f"{output['answer']!r} ({output['start']}-{output['end']})"
    if "labels" in output:
        return " ".join(map(str, output["labels"]))
    left = f" (exit {output['exit']}, {output['why']})" if "exit" in output else ""
    best = max(output.get("scores", {}).values(), default=None) if isinstance(output.get("scores"), dict) else None
    return f"{output.get('label')}" + (f" {best:.3f}" if best is not None else "") + left
