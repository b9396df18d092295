"""How fast are engines and kernels on a GPU, against PyTorch and against what the card can do?

    python -m benchmarks.gpu [--parts kernels,encoder,decoder] [--max-seconds 540] [--work DIR] [--out FILE] [--quick]

Kernels: the merge operators in Triton beside the eager ones and a copy of as many bytes. Encoder: BERT-base, ratios 1,
2, 4, 8. Decoder: T5-base, ratios 1, 2, 3, 6, writing 32 tokens. Random weights, nothing is downloaded. Engines are
those of ONNX Runtime on CUDA with CUDA graphs, and of TensorRT where it is installed; PyTorch runs eagerly, and an
encoder compiled too. All that is compared is timed in turn, A B A B. The card's ceilings, the pace of products and of
copies, are measured in the same run; "roofline" is the share of them that a time stands for.

Every cell is kept in --work as soon as it is measured: a run that ends at --max-seconds is gone on with by the next.
Targets are those of an H200: exit code 3 when one is missed, or not measured yet; other cards are not judged. With
--device cpu --quick all of it runs on tiny models without a card, to see that it does.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import gpu_kernels
from benchmarks.gpu_device import DTYPES, Device
from benchmarks.gpu_judge import CARD, TARGETS, Ceilings, Row, crossovers, missed
from benchmarks.gpu_models import RATIOS, SIZES, ModelCell, Subjects
from benchmarks.record import among, command_line, judged, save
from compexport.errors import CompexportError

PARTS = ("kernels", "encoder", "decoder")


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    device = Device(options.device)
    name = f"gpu-{device.name}{'-quick' if options.quick else ''}.json"
    ledger = Ledger(options.work / name, {"card": device.card, "tokens": options.tokens})
    until = time.monotonic() + options.max_seconds
    ceilings = _ceilings(device, options)
    left = 0
    skipped: dict[str, str] = {}
    if "kernels" in options.parts and (reason := gpu_kernels.unavailable()):
        options.parts.remove("kernels")
        skipped["kernels"] = reason
    for cells, open_subjects in _work(options, device):
        missing = [cell for cell in cells if cell.key not in ledger.rows]
        if missing and time.monotonic() < until:
            with open_subjects() as measure:
                for cell in missing:
                    if time.monotonic() >= until:
                        break
                    print(cell.key, file=sys.stderr, flush=True)
                    try:
                        ledger.add(cell.key, measure(cell, ceilings))
                    except (CompexportError, RuntimeError) as error:  # no reason to lose the other cells
                        skipped[cell.key] = " ".join(f"{cell.key}: {error}".split())[:500]
                skipped |= measure.skipped
        left += sum(cell.key not in ledger.rows for cell in cells)
    result = _result(options, device, ceilings, ledger, skipped)
    save(options.out, result)
    for reason in skipped.values():
        print(f"not timed: {reason}", file=sys.stderr)
    if left:
        print(f"{left} cells are left: run it again, it goes on", file=sys.stderr)
    if CARD not in device.card or options.quick:
        print(f"targets are an {CARD}'s at full size: nothing is judged here", file=sys.stderr)
        return 0
    return judged(missed(result["kernels"], result["rows"]))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = command_line(__doc__, "gpu", work=True)
    parser.add_argument("--parts", type=among(PARTS), default=list(PARTS))
    parser.add_argument("--precision", type=among(DTYPES), default=["fp16", "bf16"])
    parser.add_argument("--batch", type=numbers, default=[1, 8, 32, 128])
    parser.add_argument("--length", type=numbers, default=[128, 384, 512])
    parser.add_argument("--tokens", type=int, default=32, help="that a decoder writes")
    parser.add_argument("--runs", type=int, default=50, help="of each, at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each cell, at least")
    parser.add_argument("--max-seconds", type=float, default=float("inf"), help="begin no cell after so many")
    parser.add_argument("--without-compile", action="store_true", help="do not time torch.compile, which takes minutes")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny models and sizes")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batch, options.length, options.tokens, options.runs, options.seconds = [1, 2], [12], 4, 3, 0.0
    if options.device == "cpu":
        options.precision = ["fp32"]  # the processor has no fast products in half precision
    return options


class Ledger:
    """Rows of the cells that are measured, in a file that a later run goes on with."""

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        """``facts``: the same of all rows that no row has. SystemExit for a file with others."""
        self._path, self._facts = path, dict(facts)
        self.rows: dict[str, list[Row]] = {}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            self.rows = kept.pop("rows")
            if kept != self._facts:
                raise SystemExit(f"{path}: of {_said(kept)}, not of {_said(self._facts)}; name another --work")

    def add(self, key: str, rows: list[Row]) -> None:
        """Keep a cell."""
        self.rows[key] = rows
        save(self._path, {**self._facts, "rows": self.rows})

    def of(self, *parts: str) -> list[Row]:
        """All rows of these parts."""
        return [row for rows in self.rows.values() for row in rows if row["part"] in parts]


def _said(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in facts.items())


def _ceilings(device: Device, options: argparse.Namespace) -> Ceilings:
    size, copied = (256, 1 << 22) if options.quick else (8192, 1 << 31)
    return device.ceilings([*dict.fromkeys(["fp32", *options.precision])], size=size, copied_bytes=copied)


# --- what is measured ------------------------------------------------------------------------------------------------


class _Kernels:
    """Measures kernels; nothing has to be opened."""

    def __init__(self, device: Device, runs: int) -> None:
        self._device, self._runs = device, runs
        self.skipped: dict[str, str] = {}

    def __enter__(self) -> _Kernels:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __call__(self, cell: gpu_kernels.KernelCell, ceilings: Ceilings) -> list[Row]:
        return [gpu_kernels.measured(cell, self._device, ceilings, self._runs)]


class _Models:
    """Measures one model in one precision."""

    def __init__(self, part: str, model: str, precision: str, device: Device, options: argparse.Namespace) -> None:
        compiled = not options.without_compile
        work = {"work": options.work, "tokens": options.tokens, "compiled": compiled}
        self._subjects = Subjects(part, model, precision, device, **work)
        self._runs, self._seconds = options.runs, options.seconds
        self.skipped = self._subjects.skipped

    def __enter__(self) -> _Models:
        self._subjects.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._subjects.__exit__(*exception)

    def __call__(self, cell: ModelCell, ceilings: Ceilings) -> list[Row]:
        # What writes 32 tokens takes long enough for fewer runs to be steady.
        runs = self._runs if cell.part == "encoder" else max(3, self._runs // 5)
        return self._subjects.measured(cell, ceilings, runs, self._seconds)


def _work(options: argparse.Namespace, device: Device) -> Iterator[tuple[list[Any], Callable[[], Any]]]:
    """Cells that share what has to be opened, and what opens it."""
    if "kernels" in options.parts:
        yield list(gpu_kernels.cells(options.quick, options.precision)), lambda: _Kernels(device, options.runs)
    for part in ("encoder", "decoder"):
        if part not in options.parts:
            continue
        model = f"{SIZES[part]}-{'tiny' if options.quick else 'base'}"
        for precision in options.precision:
            cells = [
                ModelCell(part, model, precision, batch, length) for length in options.length for batch in options.batch
            ]
            yield (
                cells,
                lambda part=part, model=model, precision=precision: _Models(  # type: ignore[misc]
                    part, model, precision, device, options
                ),
            )


def _result(
    options: argparse.Namespace, device: Device, ceilings: Ceilings, ledger: Ledger, skipped: dict[str, str]
) -> dict[str, Any]:
    rows = ledger.of("encoder", "decoder")
    return {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "environment": device.environment(),
        "quick": options.quick,
        "ratios": RATIOS,
        "tokens": options.tokens,
        "targets": TARGETS,
        "ceilings": asdict(ceilings),
        "kernels": ledger.of("kernels"),
        "rows": rows,
        "crossovers": crossovers(rows),
        "not_timed": skipped,
    }


if __name__ == "__main__":
    sys.exit(main())
