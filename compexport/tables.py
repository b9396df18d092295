"""The table of each command, made from the same document that ``--json`` prints.

A ratio is never shown as a speed-up: ratio, FLOPs ceiling, measured speed-up and quality stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compexport.latency import faster_from
from compexport.present import Table, cell
from engines.manifest import DECODER, DECODER_WITH_PAST, ENCODER
from engines.points import (
    encoder_name,
    first_token_name,
    is_part,
    is_point,
    is_segment,
    is_token,
    variant_of,
    written_before,
)


def build_table(document: Mapping[str, Any]) -> Table:
    """``build``: what was made, how it compares in cost, and how far it is from PyTorch."""
    columns = ("variant", "ratio", "FLOPs ceiling", "parameters", "max |difference|", "state")
    rows = [
        (
            shown_name(row),
            row["ratio"],
            row["flops_ratio"],
            f"{row['params']:,}",
            f"{row['parity_max_abs']:.1e}",
            "reused" if row["reused"] else "built",
        )
        for row in document["variants"]
    ]
    return Table(f"{document['bundle']}: built in {document['seconds']:.1f} s", columns, rows)


def engines_table(document: Mapping[str, Any]) -> Table:
    """``build`` for TensorRT: every engine of the bundle, for which device, and how large its file is."""
    columns = ("graph", "backend", "version", "device", "MiB")
    rows = [
        (row["graph"], row["backend"], row["version"], row["device"], row["size_bytes"] / 2**20)
        for row in document["engines"]
    ]
    return Table(f"{document['bundle']}: engines", columns, rows)


def shown_name(row: Mapping[str, Any]) -> str:
    """A variant's name, and that its plugins are random where they are."""
    return f"{row['variant']} (untrained)" if row.get("untrained") else str(row["variant"])


def bench_table(document: Mapping[str, Any], variants: Mapping[str, Any], quality: Mapping[str, Any] | None) -> Table:
    """``bench``: one row per variant and size, the ratio beside what it can gain, gains, and costs."""
    realised = {(row["variant"], row["batch"], row["length"]): row for row in document["realised"]}
    values = (quality or {}).get("variants", {})
    metric = (quality or {}).get("metric", "quality")
    rows = []
    whole = [row for row in document["rows"] if not is_part(row["variant"])]
    for row in sorted(whole, key=lambda r: (r["batch"], r["length"])):
        name = row["variant"]
        gain = realised.get((name, row["batch"], row["length"]), {})
        variant = variants[name]
        rows.append(
            (
                shown_name({"variant": name, "untrained": variant.untrained}),
                variant.ratio,
                row["batch"],
                row["length"],
                row["p50_ms"],
                row["p99_ms"],
                gain.get("ideal"),
                gain.get("speedup"),
                gain.get("realised"),
                values.get(name),
            )
        )
    measured = ("batch", "length", "p50 ms", "p99 ms", "FLOPs ceiling", "speed-up", "realised")
    gains = faster_from([row for row in document["realised"] if not is_part(row["variant"])])
    notes = [faster_from_note(name, size) for name, size in gains.items()]
    if any(is_token(row["variant"]) for row in document["rows"]):
        notes.append("all times above are up to the first token that is written; the time of whole texts: `select`")
    return Table(f"latency on {document['device']}", ("variant", "ratio", *measured, metric), rows, notes)


def tokens_table(document: Mapping[str, Any]) -> Table:
    """``bench``: what one more token costs each decoder after so many others, and what that gains."""
    rows = [
        (row["variant"], *_timed(row), *_gains(document, row))
        for row in _by_size(document)
        if is_token(row["variant"]) and written_before(row["variant"]) is None
    ]
    columns = ("one more token", "batch", "after", "p50 ms", "p99 ms", "tokens/s")
    return Table("generation", (*columns, "FLOPs ceiling", "speed-up", "realised"), rows)


def reading_and_writing_table(document: Mapping[str, Any], variants: Mapping[str, Any]) -> Table:
    """``bench``: what each graph costs of variants that read one text and write another, whoever shares it."""
    rows: dict[object, tuple[Any, ...]] = {}
    for row in _by_size(document):
        name, owner = row["variant"], variant_of(row["variant"])
        part, written = name.removeprefix(f"{owner}/"), written_before(name)
        role = DECODER_WITH_PAST if written is not None else _ROLES.get(part)
        if role is None:
            continue
        shown = part.replace("-", " ") if written is None else f"one more token after {written}"
        graph = variants[owner].graphs[role]
        *timed, per_second = _timed(row)
        timed.append(None if written is None else per_second)
        rows.setdefault((graph, shown, *timed[:2]), (graph, shown, *timed, *_gains(document, row)))
    columns = ("graph", "part", "batch", "length read", "p50 ms", "p99 ms", "tokens/s")
    return Table("reading and writing", (*columns, "FLOPs ceiling", "speed-up", "realised"), list(rows.values()))


# The graph that a part of this name runs.
_ROLES = {encoder_name("").strip("/"): ENCODER, first_token_name("").strip("/"): DECODER}


def _by_size(document: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(document["rows"], key=lambda row: (row["batch"], row["length"]))


def _timed(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """Size, times, and tokens per second, where it is the row of one more token for every text of the batch."""
    return (row["batch"], row["length"], row["p50_ms"], row["p99_ms"], 1e3 * row["batch"] / row["p50_ms"])


def _gains(document: Mapping[str, Any], row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What ``realised`` says of a row."""
    keys = ("variant", "batch", "length")
    found = (one for one in document["realised"] if all(one[key] == row[key] for key in keys))
    gain: Mapping[str, Any] = next(found, {})
    return tuple(gain.get(name) for name in ("ideal", "speedup", "realised"))


def segments_table(document: Mapping[str, Any]) -> Table:
    """``bench``: the segments of variants with exits, what one row or batch costs from exit to exit."""
    segments = [row for row in document["rows"] if is_segment(row["variant"])]
    columns = ("segment", "batch", "length", "p50 ms", "p99 ms")
    names = ("variant", "batch", "length", "p50_ms", "p99_ms")
    rows = [tuple(r[n] for n in names) for r in sorted(segments, key=lambda r: (r["batch"], r["length"]))]
    return Table("segments", columns, rows)


def faster_from_note(name: str, size: tuple[int, int] | None) -> str:
    """The smallest size from which a variant is worth having, in words."""
    if size is None:
        return f"{name} is not faster than the backbone from any measured size on"
    return f"{name} is faster than the backbone from batch {size[0]} × length {size[1]} on"


def evaluate_table(document: Mapping[str, Any], variants: Mapping[str, Any]) -> Table:
    """``evaluate``: the metric of each variant, what it loses against the backbone, and any further metrics."""
    further = [name for name in document["variants"][0] if name not in ("variant", "value", "drop")]
    rows = []
    for row in (row for row in document["variants"] if not is_point(row["variant"])):
        variant = variants[row["variant"]]
        name = shown_name({**row, "untrained": variant.untrained})
        values = [f"{row['value']:.4f}", f"{row['drop']:+.4f}", *(f"{row[name]:.4f}" for name in further)]
        rows.append((name, variant.ratio, variant.flops_ratio, *values))
    title = f"{document['metric']} on {document['n']} examples"
    if document.get("truth", "targets") != "targets":
        title += f", which have no targets: compared with what {document['truth']} writes"
    notes = [f"exit thresholds chosen on {document['calibration']['rows']}"] if "calibration" in document else []
    if "output_tokens" in document:
        notes.append(_lengths_note(document["output_tokens"]))
    return Table(title, ("variant", "ratio", "FLOPs ceiling", document["metric"], "drop", *further), rows, notes)


def _lengths_note(found: Mapping[str, Any]) -> str:
    cut = f"; {found['cut']} were cut at {found['max_new_tokens']}" if found["cut"] else ""
    beams = found.get("num_beams", 1)
    with_ = f", with {beams} beams" if beams > 1 else ""
    return f"outputs of {found['variant']}{with_} have {found['p50']} tokens (p50) to {found['p99']} (p99){cut}"


def points_table(document: Mapping[str, Any]) -> Table:
    """``evaluate``: the operating points of variants with exits; FLOPs count what rows are expected to need."""
    rows: list[tuple[Any, ...]] = []
    seen: dict[tuple[str, str], str] = {}
    for name, point in document["points"].items():
        same = seen.setdefault((point["variant"], _thresholds(point["rule"])), name)
        if same != name:
            # The coarsest thresholds that there are may serve several wishes.
            rows.append((name, point["flops_ratio"], point["speedup"], None, None, f"as {same}", None))
            continue
        layers = document["exits"][point["variant"]]["layers"]
        left = ", ".join(f"{layer}: {share:.0%}" for layer, share in zip(layers, point["histogram"], strict=True))
        shown = [f"{point['value']:.4f}", f"{point['drop']:+.4f}", _thresholds(point["rule"]), left]
        rows.append((name, point["flops_ratio"], point["speedup"], *shown))
    columns = ("operating point", "FLOPs ceiling", "of it by exits", document["metric"], "drop", "threshold")
    return Table("operating points", (*columns, "rows that leave at exit"), rows)


def _thresholds(rule: Mapping[str, Any]) -> str:
    given = rule["thresholds"] if isinstance(rule["thresholds"], list) else [rule["thresholds"]]
    sign = "<" if rule["statistic"] == "entropy" else ">"
    return f"{rule['statistic']} {sign} " + ", ".join("never" if value < 0 else f"{value:.3g}" for value in given)


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


def verify_table(document: Mapping[str, Any]) -> Table:
    """``verify``: every problem found."""
    rows = [(row["file"], row["problem"]) for row in document["problems"]]
    title = f"{document['files']} files checked: " + ("all right" if document["ok"] else f"{len(rows)} problem(s)")
    return Table(title, ("file", "problem"), rows) if rows else Table(title, (), ())


def train_table(document: Mapping[str, Any]) -> Table:
    """``train``: what each ratio's plugins add to the model, and how close they come to it."""
    metric = document["metric"]
    rows = [
        (
            ratio,
            f"{document['extra_params'][str(ratio)]:,}",
            _percent(document["extra_params_share"][str(ratio)]),
            f"{document['student'][str(ratio)]:.4f}",
        )
        for ratio in document["ratios"]
    ]
    title = f"{document['output']}: plugins fitted in {document['steps']} steps, {document['seconds']:.0f} s"
    notes = [f"{metric} of the backbone itself: {document['teacher']:.4f}"]
    return Table(title, ("ratio", "extra parameters", "share", f"{metric}, held out"), rows, notes)


def costeff_table(document: Mapping[str, Any]) -> Table:
    """``train costeff``: how large each ratio's model is, and how good its exits are."""
    metric, rows = document["metric"], []
    for ratio in map(str, document["ratios"]):
        exits = document["exits"][ratio]
        best = " ".join(f"{value:.3f}" for value in exits)
        share = _percent(document["extra_params_share"][ratio])
        rows.append((ratio, document["sizes"][ratio], share, f"{exits[-1]:.4f}", best))
    columns = ("ratio", "size", "parameters", metric, "after each layer")
    title = f"{document['output']}: trained in {document['steps']} steps, {document['seconds']:.0f} s"
    notes = [f"{metric} of the backbone itself: {document['teacher']:.4f}, on {document['held_out']} rows"]
    return Table(title, columns, rows, notes)


def ode_table(document: Mapping[str, Any]) -> Table:
    """``train ode``: how good the model is in fewer steps, beside plainly leaving iterations out."""
    metric, total = document["metric"], document["iterations"]
    rows = [(1, total, f"{document['teacher']:.4f}", None)]
    for ratio in map(str, document["ratios"]):
        values = (f"{document[name][ratio]:.4f}" for name in ("student", "dropped"))
        rows.append((ratio, document["n"][ratio], *values))
    title = f"{document['output']}: trained in {document['steps']} steps, {document['seconds']:.0f} s"
    notes = [f"{document['form']} form of a step; measured on {document['held_out']} rows"]
    if not document["learnt"]:
        always = f"the commonest answer alone has {metric} {document['majority']:.4f}"
        notes.append(f"warning: nothing was learnt: {always}; train longer, or look at the data and the learning rate")
    return Table(title, ("ratio", "steps", metric, "iterations dropped"), rows, notes)


def modular_table(document: Mapping[str, Any]) -> Table:
    """``train modular``: what each ratio's assembly is made of, and how much of the base's answers it keeps."""
    metric, rows = document["metric"], []
    for ratio, assembly in document["assemblies"].items():
        tiles = ("+".join(map(str, assembly[stack])) for stack in ("encoder", "decoder"))
        rows.append((ratio, *tiles, f"{document['student'][ratio]:.4f}"))
    title = f"{document['output']}: modules trained in {document['steps']} steps, {document['seconds']:.0f} s"
    share = _percent(document["module_params_share"])
    notes = [
        f"{metric} of the base itself: {document['teacher']:.4f}, on {document['held_out']} rows",
        f"all modules: {document['module_params']:,} parameters, {share} of the base's",
    ]
    return Table(title, ("ratio", "encoder tiles", "decoder tiles", metric), rows, notes)


def finetune_table(document: Mapping[str, Any]) -> Table:
    """``train finetune``: how good the model is, beside what needs no model."""
    title = f"{document['output']}: fine-tuned in {document['steps']} steps, {document['seconds']:.0f} s"
    names = document["labels"]
    labels = f"{len(names)} labels: {', '.join(names)}" if names else "it writes the targets of the data"
    if document["value"] is None:
        notes = [labels, "no dev data beside the training data: not measured"]
        return Table(title, (), (), notes)
    rows = [("fine-tuned", document["value"])]
    if document["majority"] is not None:
        rows.append(("most common label", document["majority"]))
    return Table(title, ("", f"{document['metric']}, {document['held_out']} dev rows"), rows, [labels])


TRAIN_TABLES = {
    "variator": train_table,
    "costeff": costeff_table,
    "ode": ode_table,
    "modular": modular_table,
    "finetune": finetune_table,
}


def export_table(document: Mapping[str, Any]) -> Table:
    """``export``: which variant, and where it is now."""
    size = f"{document['size_bytes'] / 1e6:.1f} MB"
    title = f"{document['output']}: {document['variant']}, {size}: {', '.join(document['files'])}"
    return Table(title, (), [], [])


def import_table(document: Mapping[str, Any]) -> Table:
    """``import``: what the file added to the model, and what its backbone is made of."""
    if document["method"] == "costeff":
        return _slender_table(document)
    if document["method"] == "theseus":
        return _successors_table(document)
    ratio = document["ratio"]
    rows = [] if ratio is None else [(ratio, f"{document['extra_params']:,}", _percent(document["extra_params_share"]))]
    source = "this file" if document["backbone_from_file"] else document["backbone"]
    notes = [f"backbone from {source}; ratios there now: {', '.join(map(str, document['ratios'])) or 'none'}"]
    if document["lora"]:
        notes.append(f"LoRA updates merged into {document['lora']} matrices")
    title = f"{document['output']}: {document['tensors']} tensors imported"
    return Table(title, ("ratio", "extra parameters", "share") if rows else (), rows, notes)


def _slender_table(document: Mapping[str, Any]) -> Table:
    """``import costeff``: the size of the model beside its teacher's."""
    rows = [(document["ratio"], f"{document['params']:,}", _percent(document["params_share"]))]
    there = f"ratios there now: {', '.join(map(str, document['ratios']))}"
    made = "the backbone is this model at full width: name its teacher with --backbone to compare with that"
    notes = [f"{made}; {there}" if document["backbone_from_file"] else f"backbone from {document['backbone']}; {there}"]
    title = f"{document['output']}: {document['tensors']} tensors imported"
    return Table(title, ("ratio", "parameters", "of the backbone's"), rows, notes)


def _successors_table(document: Mapping[str, Any]) -> Table:
    """``import theseus``: the size of the plain model."""
    rows = [(document["layers"], document["replaced"], f"{document['params']:,}")]
    notes = [f"a plain model for {document['task']}: build it, or compress it further"]
    title = f"{document['output']}: {document['tensors']} tensors imported"
    return Table(title, ("layers", "replaced", "parameters"), rows, notes)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def inspect_tables(manifest: Mapping[str, Any]) -> list[Table]:
    """``inspect``: the manifest in short."""
    backbone = manifest["backbone"]
    with_exits = any("exits" in variant for variant in manifest["variants"].values())
    variants = [
        (
            shown_name({"variant": name, **variant}),
            variant["ratio"],
            variant["flops_ratio"],
            variant["precision"],
            f"{variant['extra_params']:,}",
            *((", ".join(map(str, variant.get("exits", ()))) or None,) if with_exits else ()),
            ", ".join(variant["graphs"].values()),
        )
        for name, variant in manifest["variants"].items()
    ]
    engines = [
        (name, engine["graph"], engine["backend"], engine["backend_version"], engine["device"])
        for name, engine in manifest["engines"].items()
    ]
    about = f"{backbone['name']} ({backbone['architecture']}, {backbone['params']:,} parameters), {manifest['task']}"
    exits = ("exits",) if with_exits else ()
    columns = ("variant", "ratio", "FLOPs ceiling", "precision", "extra parameters", *exits, "graphs")
    return [
        Table(about, columns, variants),
        Table("engines", ("engine", "graph", "backend", "version", "device"), engines),
    ]


def target_tables(document: Mapping[str, Any]) -> list[Table]:
    """``inspect --target``: what is expected of each graph, what the real parser said, and every broken rule."""
    parser = f"parsed by TensorRT-RTX {document['parser'] or ''}".strip()
    rows = [
        (
            graph["graph"],
            ", ".join(graph["variants"]) or None,
            graph["expected"],
            _parsed(graph),
            len(graph["findings"]),
        )
        for graph in document["graphs"]
    ]
    notes = [document["parser_missing"]] if document["parser_missing"] else []
    notes += ["expected to parse: no known rule is broken; only the compiler itself, on its own machine, can tell"]
    columns = ("graph", "variants", "expected", parser, "findings")
    return [
        Table(f"checked for {document['target']}", columns, rows, [*notes, *_tied(document)]),
        *_findings_tables(document),
    ]


def _parsed(graph: Mapping[str, Any]) -> str | None:
    parsed = graph["parsed"]
    return None if parsed is None else "yes" if parsed["ok"] else "refused"


def _tied(document: Mapping[str, Any]) -> list[str]:
    """Each set of axes once, however many graphs have it; of long ones the beginning, which --json has whole."""
    ties = {(name, tuple(axes)) for graph in document["graphs"] for name, axes in graph["sizes"].items()}
    return [f"one size in every profile, {name}: {_begun(axes)}" for name, axes in sorted(ties)]


def _begun(names: Sequence[str], shown: int = 4) -> str:
    rest = len(names) - shown
    return ", ".join(names[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _findings_tables(document: Mapping[str, Any]) -> list[Table]:
    found = [
        (graph["graph"], one["operator"] or None, one["node"] or None, _where(one), one["outcome"], _asks(one))
        for graph in document["graphs"]
        for one in graph["findings"]
    ]
    refused = [
        (graph["graph"], error["operator"] or None, error["node"] or None, " ".join(error["says"].split()))
        for graph in document["graphs"]
        for error in (graph["parsed"] or {"errors": ()})["errors"]
    ]
    tables = []
    if found:
        columns = ("graph", "operator", "node", "module", "outcome", "rule")
        tables.append(Table("findings", columns, found))
    if refused:
        tables.append(Table("what TensorRT-RTX said", ("graph", "operator", "node", "error"), refused))
    return tables


def _where(finding: Mapping[str, Any]) -> str | None:
    return ", in ".join(part for part in (finding["module"], finding["function"]) if part) or None


def _asks(finding: Mapping[str, Any]) -> str:
    return f"{finding['rule']}: got {finding['got']}, expected {finding['expected']} ({finding['evidence']})"
