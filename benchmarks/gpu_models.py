"""Whole models on the device: engines of every ratio beside PyTorch, all fed alike and timed in turn.

"engine" is the model alone: ids come from the host, results stay where they are computed. "end to end" is from texts to
answers. Weights are random, words are single bytes, so a text of n letters has n tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models
from benchmarks.gpu_device import DTYPES, Device
from benchmarks.gpu_judge import Ceilings, Row, bound_ms, percentiles, ratio_of, with_speedups
from benchmarks.seq2seq import by_engines, endless, macs_written
from compexport.errors import CompexportError
from compexport.latency import random_feeds
from engines import backends
from engines.backends.trt_options import PlanOptions, Range
from engines.bundle import Bundle
from engines.manifest import DECODER, DECODER_WITH_PAST, ENCODER
from engines.measure import in_turn
from engines.runtime import Runtime
from exporter import family

RATIOS = {"encoder": (1, 2, 4, 8), "decoder": (1, 2, 3, 6)}  # layers of the base size divide by 6 at most
SIZES = {"encoder": "bert", "decoder": "t5"}
WHATS = ("engine", "end to end")

Call = Callable[[], object]


@dataclass(frozen=True)
class ModelCell:
    """One model at one size: everything that is timed in turn."""

    part: str
    model: str
    precision: str
    batch: int
    length: int

    @property
    def key(self) -> str:
        """Its name in the work folder."""
        return f"{self.part} {self.model} {self.precision} {self.batch}x{self.length}"


class Subjects:
    """What is timed of one model in one precision, opened: a context manager. ``skipped`` says what is not, and why."""

    def __init__(
        self, part: str, model: str, precision: str, device: Device, work: Path, *, tokens: int, compiled: bool
    ) -> None:
        """``tokens``: that a decoder writes. ``compiled``: time ``torch.compile`` too."""
        self.part, self.model, self.precision, self.device = part, model, precision, device
        self.tokens, self.compiled = tokens, compiled
        self.skipped: dict[str, str] = {}
        make = models.bert if part == "encoder" else models.seq2seq
        self.folder = make(work / model, model)
        self._work = work
        self._stack = ExitStack()

    def __enter__(self) -> Subjects:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def measured(self, cell: ModelCell, ceilings: Ceilings, runs: int, seconds: float) -> list[Row]:
        """A row for each subject, engine alone and end to end."""
        rows = []
        for what in WHATS:
            clocks = {name: partial(self.device.wall_ms, call) for name, call in self._calls(cell, what).items()}
            taken = in_turn(clocks, min_runs=runs, min_seconds=seconds, warmup=4)
            times = {name: percentiles(found) for name, found in taken.items()}
            rows += with_speedups([self._row(cell, what, name, found, ceilings) for name, found in times.items()])
        return rows

    def _row(self, cell: ModelCell, what: str, subject: str, times: Row, ceilings: Ceilings) -> Row:
        macs, size_bytes = self._work_of(ratio_of(subject), cell)
        least = bound_ms(macs, size_bytes, cell.precision, ceilings)
        bound = {"macs": macs, "weight_bytes": size_bytes, "bound_ms": round(least, 4)}
        share = {"share_of_roofline": round(least / times["p50_ms"], 3)}
        return {**vars(cell), "what": what, "subject": subject, **times, **bound, **share}

    def _work_of(self, ratio: float, cell: ModelCell) -> tuple[float, float]:
        """Multiply-accumulates of a run, and the bytes of weights that it reads at least."""
        manifest = self.bundle.manifest
        variant = next(name for name, found in manifest.variants.items() if found.ratio == ratio)
        graphs = manifest.variants[variant].graphs
        size = {role: self._weight_bytes[graph] for role, graph in graphs.items()}
        if self.part == "encoder":
            cost = manifest.graphs[graphs[ENCODER]].cost
            return cell.batch * cost.macs(cell.length), size[ENCODER]
        macs = cell.batch * macs_written(manifest, variant, cell.length, self.tokens)
        return macs, size[ENCODER] + size[DECODER] + (self.tokens - 1) * size[DECODER_WITH_PAST]

    @cached_property
    def _weight_bytes(self) -> dict[str, int]:
        return {name: read_bytes(self.bundle.file(graph.path)) for name, graph in self.bundle.manifest.graphs.items()}

    # --- engines

    @cached_property
    def bundle(self) -> Bundle:
        """Graphs of all ratios; plans too where TensorRT is; engines for the processor where that is the device."""
        target = self._work / f"{self.model}-{self.precision}-{self.device.name}"
        built: dict[str, Any] = {"backend": "ort", "precision": self.precision}
        if self.device.is_cuda:  # a recipe costs nothing, and ONNX Runtime on CUDA runs the graphs themselves
            recipe = bool(backends.available()["trt"])
            built |= {"backend": "trt", "plans": PlanOptions(Range(1, 8, 128), Range(1, 128, 512), recipe=recipe)}
        method = "modular" if self.part == "decoder" else None
        family.build(self.folder, RATIOS[self.part][1:], target, method=method, untrained=True, **built)
        return Bundle.open(target)

    @cached_property
    def runtimes(self) -> dict[str, Runtime]:
        """Whatever of our backends runs here."""
        wanted = {"ort": "cpu"}
        if self.device.is_cuda:
            wanted = {"ort": "cuda-graphs", "trt": "cuda-graphs"}
        found = {}
        for backend, provider in wanted.items():
            try:
                runtime = Runtime(self.bundle, backend=backend, provider=provider)
                found[backend] = self._stack.enter_context(runtime)
                runtime.warm_up()
            except CompexportError as error:
                found.pop(backend, None)
                self.skipped[backend] = str(error)
        return found

    def _calls(self, cell: ModelCell, what: str) -> dict[str, Call]:
        ids = _ids(cell)
        texts = ["".join(chr(97 + number % 26) for number in row) for row in ids]
        calls: dict[str, Call] = {}
        for backend, runtime in self.runtimes.items():
            for ratio in RATIOS[self.part]:
                variant = runtime.members.of_ratio(ratio)
                calls[f"{backend} r{ratio}"] = (
                    self._engine(runtime, variant, ids)
                    if what == "engine"
                    else partial(runtime.answers, variant, texts, self._settings)
                )
        return {**calls, **self._in_torch(ids, texts, what)}

    @property
    def _settings(self) -> Mapping[str, Any] | None:
        return {"max_new_tokens": self.tokens} if self.part == "decoder" else None

    def _engine(self, runtime: Runtime, variant: str, ids: np.ndarray) -> Call:
        if self.part == "decoder":
            return partial(by_engines, endless(runtime.generator(variant)), ids, self.tokens)
        session: Any = runtime.session(variant)
        feeds = random_feeds(session.inputs, *ids.shape)
        return partial(session.run_held, feeds, {}, (), [output.name for output in session.outputs])

    # --- PyTorch

    def _in_torch(self, ids: np.ndarray, texts: Sequence[str], what: str) -> dict[str, Call]:
        torch = self.device.torch
        here = torch.from_numpy(ids).to(self.device.name)
        run = self._forward if self.part == "encoder" else self._written
        calls: dict[str, Call] = {}
        for name, model in self._torch_models.items():
            calls[f"torch {name}"] = (
                partial(run, model, here) if what == "engine" else partial(self._answered, run, model, texts)
            )
        return calls

    @cached_property
    def _torch_models(self) -> dict[str, Any]:
        import transformers

        torch = self.device.torch
        kind = "SequenceClassification" if self.part == "encoder" else "Seq2SeqLM"
        dtype = getattr(torch, DTYPES[self.precision])
        loader = getattr(transformers, f"AutoModelFor{kind}")
        model = loader.from_pretrained(self.folder, dtype=dtype).to(self.device.name).eval()
        for settings in (model.config, getattr(model, "generation_config", None)):
            if settings is not None and self.part == "decoder":
                settings.eos_token_id = settings.forced_eos_token_id = None
        found = {"eager": model}
        if self.compiled and self.part == "encoder":
            # Compiling for a card takes about a minute a size; elsewhere only whether it is called rightly matters.
            how: dict[str, Any] = {"mode": "reduce-overhead"} if self.device.is_cuda else {"backend": "eager"}
            found["compiled"] = torch.compile(model, dynamic=False, **how)
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(self.folder / "tokenizer.json"))

    def _answered(self, run: Callable[[Any, Any], Any], model: Any, texts: Sequence[str]) -> Any:
        torch = self.device.torch
        ids = torch.tensor([encoded.ids for encoded in self._tokenizer.encode_batch(list(texts))])
        return run(model, ids.to(self.device.name)).cpu()

    def _forward(self, model: Any, ids: Any) -> Any:
        with self.device.torch.inference_mode():
            return model(input_ids=ids, attention_mask=self.device.torch.ones_like(ids)).logits

    def _written(self, model: Any, ids: Any) -> Any:
        torch = self.device.torch
        with torch.inference_mode():
            return model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=self.tokens,
                do_sample=False,
                num_beams=1,
            )


def _ids(cell: ModelCell) -> np.ndarray:
    return np.random.default_rng(cell.batch).integers(5, 100, (cell.batch, cell.length), dtype=np.int64)


def read_bytes(path: Path) -> int:
    """Bytes of the weights that a graph reads whole: not those of tables of which it takes rows."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    whole = set()
    for node in model.graph.node:
        whole.update(node.input[1:] if node.op_type == "Gather" else node.input)
    sizes = {tensor.name: prod(tensor.dims) * _item_bytes(tensor.data_type) for tensor in model.graph.initializer}
    return sum(size for name, size in sizes.items() if name in whole)


def _item_bytes(kind: int) -> int:
    import onnx

    if kind == onnx.TensorProto.BFLOAT16:
        return 2
    return int(onnx.helper.tensor_dtype_to_np_dtype(kind).itemsize)
