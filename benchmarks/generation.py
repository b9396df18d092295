"""How many more tokens per second does a decoder write in half its steps?

    python -m benchmarks.generation [--models base,large,xl] [--prompt 64] [--tokens 64] [--out FILE] [--quick]

GPT-2s of several sizes whose layers are one, random weights, ratios 1 and 2: both read the same prompt and write as
many tokens, greedily and with the cache on, in turn. "ceiling" is the quotient of their MACs: the product with the
vocabulary is there whatever the steps are, and the smaller the model, the larger its part. Exit code 3 when the target
is missed, at the last of the models: 1.8 times the tokens per second.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Any

import numpy as np

from benchmarks.models import GPT2, shared_gpt2
from benchmarks.record import among, command_line, judged, save
from engines.bundle import Bundle
from engines.causal import CausalGenerator
from engines.generate import Generator
from engines.manifest import DECODER, GENERATION
from engines.measure import environment, interleave
from engines.options import Options
from engines.runtime import Runtime
from exporter import family

RATIOS = (1, 2)
TARGET = 1.8


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    rows = [_measured(size, options) for size in options.models]
    result = {
        "question": __doc__.splitlines()[0] if __doc__ else "",
        "environment": environment(),
        "prompt": options.prompt,
        "tokens": options.tokens,
        "target": TARGET,
        "models": rows,
    }
    save(options.out, result)
    return judged(missed(result))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = command_line(__doc__, "generation", work=True)
    parser.add_argument("--models", type=among(GPT2), default=["base", "large", "xl"], help="the largest last")
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to write")
    parser.add_argument("--runs", type=int, default=5, help="of each ratio")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that all of it runs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.models, options.prompt, options.tokens, options.runs = ["tiny"], 8, 8, 3
    return options


def _measured(size: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both ratios of one model, in turn: prompt and tokens together, and each alone."""
    folder, bundle = options.work / f"gpt2-{size}", options.work / f"gpt2-{size}-bundle"
    family.build(shared_gpt2(folder, size), RATIOS[1:], bundle, task=GENERATION, method="ode")
    with Runtime(Bundle.open(bundle), threads=options.threads) as runtime:
        names = {ratio: runtime.members.of_ratio(ratio) for ratio in RATIOS}
        ids = np.random.default_rng(0).integers(0, 256, (1, options.prompt), dtype=np.int64)
        calls: dict[str, Any] = {}
        for ratio, name in names.items():
            generator = _without_end(runtime.generator(name), runtime, name)
            for part, tokens in (("whole", options.tokens), ("prompt", 1)):
                wanted = Options(max_new_tokens=tokens)
                calls[f"{ratio} {part}"] = partial(generator.generate, ids, np.ones_like(ids), options=wanted)
        timings = interleave(calls, min_runs=options.runs, min_seconds=0.0, warmup=1)
        macs = {ratio: _macs(runtime, name, options.prompt, options.tokens) for ratio, name in names.items()}
    whole, prompt = ({r: timings[f"{r} {part}"].p50_ms for r in RATIOS} for part in ("whole", "prompt"))
    width, _, layers, words = GPT2[size]
    row = {
        "model": size,
        "hidden_size": width,
        "steps": {str(ratio): layers // ratio for ratio in RATIOS},
        "vocabulary": words,
        "tokens_per_second": {str(ratio): 1e3 * options.tokens / whole[ratio] for ratio in RATIOS},
        "prompt_ms": {str(ratio): prompt[ratio] for ratio in RATIOS},
        "ms_per_token": {str(r): (whole[r] - prompt[r]) / (options.tokens - 1) for r in RATIOS},
        "speedup": whole[1] / whole[2],
        "speedup_after_prompt": (whole[1] - prompt[1]) / (whole[2] - prompt[2]),
        "ceiling": macs[1] / macs[2],
        "runs": timings["1 whole"].runs,
    }
    print(row, flush=True)
    return row


def _without_end(generator: Generator, runtime: Runtime, name: str) -> CausalGenerator:
    """One that always writes all its tokens."""
    endless = generator.generation.model_copy(update={"eos_ids": []})
    session: Any = runtime.session(name)
    return CausalGenerator(name, session, endless)


def _macs(runtime: Runtime, name: str, prompt: int, tokens: int) -> int:
    manifest = runtime.bundle.manifest
    cost = manifest.graphs[manifest.variants[name].graphs[DECODER]].cost
    return cost.macs(prompt) + sum(cost.token_macs(prompt + past) for past in range(tokens - 1))


def missed(result: dict[str, Any]) -> list[str]:
    """The target, judged where the vocabulary weighs least."""
    last = result["models"][-1]
    if last["speedup"] >= TARGET:
        return []
    return [f"missed: {last['model']}: {last['speedup']:.2f} times the tokens per second, target {TARGET}"]


if __name__ == "__main__":
    sys.exit(main())
