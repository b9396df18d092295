"""Pictures and pages: latency against quality as a PNG, and a one-page report that needs no other file."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from compexport.errors import InputError, describe
from compexport.present import Table, cell
from engines.lengths import Expected, OutputLengths
from engines.manifest import Variant, backbones
from engines.options import MAX_NEW_TOKENS
from engines.points import is_part, is_token
from engines.profile import Profile
from engines.writing_time import WritingTimes

LONGEST = 1000  # tokens that any output is drawn with at most


def require_quality(quality: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """A plot of latency against quality needs both; InputError says how to get the missing one."""
    if quality is None:
        raise InputError(describe("--plot needs the quality of each variant", hint="run `compexport evaluate` first"))
    return quality


def pareto_png(bench: Mapping[str, Any], quality: Mapping[str, Any], variants: Mapping[str, Variant]) -> bytes:
    """Time relative to the backbone (x, median) against quality (y): a line per size, a point per variant.

    Relative, because absolute times of a shared machine say little; ``bench`` prints them.
    """
    # The object interface: pyplot would keep global state and look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for (batch, length), points in sorted(_relative_points(bench, quality, variants).items()):
        axes.plot(
            *zip(*[(x, y) for x, y, _ in points], strict=True), marker="o", label=f"batch {batch} × length {length}"
        )
        for x, y, ratio in points:
            axes.annotate(f"r{ratio:g}", (x, y), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.axvline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("median time ÷ time of the backbone (left is faster)")
    axes.set_ylabel(f"{quality['metric']}, n = {quality['n']}")
    axes.set_title(f"{bench['device']}, {bench['backend']}", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=150)
    return drawn.getvalue()


def _relative_points(
    bench: Mapping[str, Any], quality: Mapping[str, Any], variants: Mapping[str, Variant]
) -> dict[tuple[int, int], list[tuple[float, float, float]]]:
    """Per (batch, length): (relative time, quality, ratio) of every evaluated variant, by ratio."""
    values = quality["variants"]
    found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
    for batch, length in dict.fromkeys((row["batch"], row["length"]) for row in bench["rows"]):
        times = _times(bench, quality, batch, length)
        backbone = next((times[name] for name in backbones(variants) if name in times), None)
        points = [(ms / backbone, values[n], variants[n].ratio) for n, ms in times.items() if backbone and n in values]
        if points:
            found[batch, length] = sorted(points, key=lambda point: point[2])
    return found


def _times(bench: Mapping[str, Any], quality: Mapping[str, Any], batch: int, length: int) -> Mapping[str, float]:
    """p50 of every variant at a size; of those that write, for as many tokens as usual."""
    if any(is_token(row["variant"]) for row in bench["rows"]):
        lengths = OutputLengths.from_table(quality)
        expected = Expected.at_most(MAX_NEW_TOKENS) if lengths is None else lengths.expected(batch, length, LONGEST)
        found = WritingTimes(Profile.from_table(bench)).writing([(batch, length)], [expected])
        return {name: one.p50_ms for name, one in found.items()}
    rows = [row for row in bench["rows"] if (row["batch"], row["length"]) == (batch, length)]
    return {row["variant"]: row["p50_ms"] for row in rows if not is_part(row["variant"])}


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1c2330; }
table { border-collapse: collapse; margin: .5rem 0 .3rem; font-variant-numeric: tabular-nums; font-size: 14px; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #dde2ea; text-align: left; }
td.n, th.n { text-align: right; } h2 { margin-top: 2rem; font-size: 1.15rem; } img { max-width: 100%; }
p.note { color: #566073; margin: .15rem 0; } div.wide { overflow-x: auto; }
"""


def page(title: str, introduction: Sequence[str], tables: Sequence[Table], picture: bytes) -> str:
    """One HTML page with everything inside it: no script, no other file, nothing fetched."""
    image = base64.b64encode(picture).decode("ascii")
    paragraphs = "".join(f"<p>{html.escape(text)}</p>\n" for text in introduction)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>\n'
        f"<h1>{html.escape(title)}</h1>\n{paragraphs}"
        f'<img alt="time relative to the backbone against quality" src="data:image/png;base64,{image}">\n'
        + "".join(map(_section, tables))
        + "</body></html>\n"
    )


def _section(table: Table) -> str:
    numeric = table.numeric()
    head = "".join(_cell("th", heading, right) for heading, right in zip(table.columns, numeric, strict=True))
    rows = "".join(
        "<tr>" + "".join(_cell("td", cell(value), right) for value, right in zip(row, numeric, strict=True)) + "</tr>\n"
        for row in table.rows
    )
    notes = "".join(f'<p class="note">{html.escape(note)}</p>\n' for note in table.notes)
    heading = f"<h2>{html.escape(table.title)}</h2>\n"
    return f'{heading}<div class="wide"><table><tr>{head}</tr>\n{rows}</table></div>\n{notes}'


def _cell(tag: str, text: str, right: bool) -> str:
    style = ' class="n"' if right else ""
    return f"<{tag}{style}>{html.escape(text)}</{tag}>"


def write_bytes(path: Path, data: bytes) -> None:
    """Write a picture or page where the user asked for it; InputError when the place cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise InputError(describe(f"cannot write {path}", got=error.strerror)) from error
