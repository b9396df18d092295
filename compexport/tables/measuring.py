"""Tables of ``bench`` and ``evaluate``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from compexport.latency import faster_from
from compexport.present import Table
from compexport.tables.naming import shown_name
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
    notes = [_faster_from_note(name, size) for name, size in gains.items()]
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


def _faster_from_note(name: str, size: tuple[int, int] | None) -> str:
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
        if same != name:  # the coarsest thresholds that there are may serve several wishes
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
