"""How fast do modular models write: against PyTorch, against optimum, and against what fewer layers should gain?

    python -m benchmarks.seq2seq [--models t5-base,bart-base] [--optimum PYTHON] [--out FILE] [--quick]

T5 of the base size (12 + 12 layers) and BART of the base size (6 + 6), random weights, ratios 1, 2, 3 and 6 chosen
speed-first. All write the same number of tokens, greedily, from the same texts, and are timed in turn: the engines of
every ratio; ``transformers.generate`` in PyTorch at ratio 1, on the same weights; and, where ``--optimum`` names the
Python of an environment that ``tests/compat/optimum_loads.py`` made, optimum-onnx on the same files, exported, in a
process of its own that lives as long as the measurement. "ceiling" is the quotient of MACs, "realised" the speed-up
over it, and "bytes_ceiling", at batch 1, the quotient of the weights that must be read (``benchmarks.traffic``). Exit
code 3 when a target is missed: 2.0 times PyTorch and 1.3 times optimum at ratio 1, 0.9 realised.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.models import SEQ2SEQ, seq2seq
from benchmarks.record import among, command_line, judged, save
from benchmarks.traffic import bytes_ceiling
from compexport import handing_on
from engines.bundle import Bundle
from engines.generate import Generator
from engines.manifest import DECODER, DECODER_WITH_PAST, ENCODER, Manifest
from engines.measure import environment, interleave
from engines.options import Options
from engines.runtime import Runtime
from exporter import family

RATIOS = (1, 2, 3, 6)
TARGETS = {"pytorch": 2.0, "optimum": 1.3, "realised": 0.9}
PEER = Path(__file__).with_name("seq2seq_peer.py")

Tokens = list[list[int]]
Call = Callable[[], Tokens]


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    rows = [row for name in options.models for row in _measured(name, options)]
    result = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "environment": environment(),
        "threads": options.threads,
        "source": options.source,
        "tokens": options.tokens,
        "models": {name: SEQ2SEQ[name][1] for name in options.models},
        "targets": TARGETS,
        "rows": rows,
    }
    save(options.out, result)
    return judged(missed(result))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "seq2seq", work=True)
    parser.add_argument("--models", type=among(SEQ2SEQ), default=["t5-base", "bart-base"])
    parser.add_argument("--source", type=int, default=64, help="tokens of each text that is read")
    parser.add_argument("--tokens", type=int, default=32, help="tokens to write")
    parser.add_argument("--batches", type=lambda text: [int(one) for one in text.split(",")], default=[1, 8])
    parser.add_argument("--runs", type=int, default=7, help="of each")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--optimum", type=Path, default=None, help="the Python that has optimum-onnx")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see that all of it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.source, options.tokens, options.runs = ["t5-tiny", "bart-tiny"], 12, 6, 3
    return options


def _measured(name: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each batch size and ratio of one model."""
    folder, bundle = options.work / name, options.work / f"{name}-bundle"
    family.build(seq2seq(folder, name), RATIOS[1:], bundle, method="modular", untrained=True)
    opened = Bundle.open(bundle)
    with Runtime(opened, threads=options.threads) as runtime, _peer(options) as peer:
        variants = {ratio: runtime.members.of_ratio(ratio) for ratio in RATIOS}
        writers = {ratio: endless(runtime.generator(variant)) for ratio, variant in variants.items()}
        exported = {ratio: _exported(opened, variant) for ratio, variant in variants.items()} if peer else {}
        torch_model = _in_pytorch(folder, options.threads)
        for batch in options.batches:
            ids = np.random.default_rng(batch).integers(5, 250, (batch, options.source), dtype=np.int64)
            calls: dict[str, Call] = {"pytorch": partial(_by_pytorch, torch_model, ids, options.tokens)}
            for ratio in RATIOS:
                calls[f"engines {ratio}"] = partial(by_engines, writers[ratio], ids, options.tokens)
                if peer:
                    calls[f"optimum {ratio}"] = partial(peer, exported[ratio], ids, options.tokens)
            same = _agreement(calls)
            timings = interleave(calls, min_runs=options.runs, min_seconds=0.0, warmup=1)
            took = {what: timing.p50_ms for what, timing in timings.items()}
            macs = {r: macs_written(opened.manifest, v, options.source, options.tokens) for r, v in variants.items()}
            for ratio in RATIOS:
                row = _row(ratio, took, macs, same)
                row = {"model": name, "batch": batch, **row, "runs": timings[f"engines {ratio}"].runs}
                if batch == 1:
                    row["bytes_ceiling"] = bytes_ceiling(SEQ2SEQ[name][1], ratio, options.tokens)
                row["tokens_per_second"] = 1e3 * batch * options.tokens / row["engines_ms"]
                print(row, flush=True)
                yield row


def _row(ratio: int, took: dict[str, float], macs: dict[float, int], same: dict[str, float]) -> dict[str, Any]:
    """Times of one ratio, what they gain, and how many tokens are the peer's."""
    ours, ceiling = took[f"engines {ratio}"], macs[1] / macs[ratio]
    speedup = took["engines 1"] / ours
    row = {"ratio": ratio, "engines_ms": ours, "speedup": speedup, "ceiling": ceiling, "realised": speedup / ceiling}
    for what, peer in (("pytorch", "pytorch"), ("optimum", f"optimum {ratio}")):
        if peer in took and (ratio == 1 or what == "optimum"):
            row |= {f"{what}_ms": took[peer], f"times_{what}": took[peer] / ours, f"same_as_{what}": same[peer]}
    return row


def _agreement(calls: dict[str, Call]) -> dict[str, float]:
    """The share of tokens that each peer chooses as the engines do; the likeliest of random weights may be close."""
    found = {}
    written = {what: np.array(call()) for what, call in calls.items()}
    for what, tokens in written.items():
        ours = written["engines 1" if what == "pytorch" else what.replace("optimum", "engines")]
        if tokens.shape != ours.shape:
            raise SystemExit(f"{what} wrote {tokens.shape} tokens, expected {ours.shape}")
        found[what] = float((tokens == ours).mean())
    return found


# --- who writes ------------------------------------------------------------------------------------------------------


def endless(generator: Generator) -> Generator:
    """One that always writes all its tokens. It belongs to a runtime of its own, so it may be changed."""
    changes = {"eos_ids": [], "forced_eos_id": None, "forced_bos_id": None, "defaults": {}}
    generator.generation = generator.generation.model_copy(update=changes)
    return generator


def by_engines(generator: Generator, ids: np.ndarray, tokens: int) -> Tokens:
    written = generator.generate(ids, np.ones_like(ids), options=Options(max_new_tokens=tokens))
    return [one.tokens for one in written]


def _in_pytorch(folder: Path, threads: int | None) -> Any:
    """The model as ``from_pretrained`` gives it, made to write on to the end."""
    import torch
    from transformers import AutoModelForSeq2SeqLM

    if threads is not None:
        torch.set_num_threads(threads)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    for settings in (model.config, model.generation_config):
        settings.eos_token_id = settings.forced_eos_token_id = settings.forced_bos_token_id = None
    return model


def _by_pytorch(model: Any, ids: np.ndarray, tokens: int) -> Tokens:
    import torch

    given = torch.from_numpy(ids)
    with torch.inference_mode():
        found = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=tokens,
            do_sample=False,
            num_beams=1,
        )
    written: Tokens = found[:, 1:].tolist()
    return written


def _exported(bundle: Bundle, variant: str) -> Path:
    """The variant's folder for optimum; made anew, for the bundle may be another one."""
    import shutil

    folder = bundle.path.parent / "exported" / variant
    shutil.rmtree(folder, ignore_errors=True)
    handing_on.export(bundle.path, folder, variant)
    return folder


@contextmanager
def _peer(options: argparse.Namespace) -> Iterator[Callable[[Path, np.ndarray, int], Tokens] | None]:
    """What generates with optimum, in a process that keeps its models open; None without its environment."""
    if options.optimum is None:
        yield None
        return
    command = [str(options.optimum), str(PEER), str(options.threads or 0)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        asked, answered = process.stdin, process.stdout

        def write(folder: Path, ids: np.ndarray, tokens: int) -> Tokens:
            asked.write(json.dumps({"folder": str(folder), "ids": ids.tolist(), "tokens": tokens}) + "\n")
            asked.flush()
            line = answered.readline()
            if not line:
                raise SystemExit("the process that runs optimum ended")
            found: Tokens = json.loads(line)
            return found

        yield write
        asked.close()


def macs_written(manifest: Manifest, variant: str, source: int, tokens: int) -> int:
    cost = {role: manifest.graphs[graph].cost for role, graph in manifest.variants[variant].graphs.items()}
    steps = sum(cost[DECODER_WITH_PAST].token_macs(past, source) for past in range(1, tokens))
    return cost[ENCODER].macs(source) + cost[DECODER].macs(1, source) + steps


def missed(result: dict[str, Any]) -> list[str]:
    """Every target that a row does not reach."""
    targets, found = result["targets"], []
    for row in result["rows"]:
        reached = {"realised": row["realised"]} if row["ratio"] > 1 else {}
        if row["ratio"] == 1:
            reached |= {name: row[f"times_{name}"] for name in ("pytorch", "optimum") if f"times_{name}" in row}
        where = f"{row['model']}, batch {row['batch']}, ratio {row['ratio']}"
        found += [
            f"missed: {where}: {name} {value:.2f}, target {targets[name]}"
            for name, value in reached.items()
            if value < targets[name]
        ]
    return found


if __name__ == "__main__":
    sys.exit(main())
