"""What one does with compexport, but for training: build, import, load, bench, evaluate, select, run, inspect, verify.

Each is a short composition of the folders below; the command line calls the same functions. Those whose result a
command prints return that command's JSON document as a dict.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from compexport.errors import BundleError, InputError, describe
from compexport.present import Progress
from compexport.stepping import Steps as Steps
from engines.backends.trt_options import PLAN_OPTIONS, PlanOptions

if TYPE_CHECKING:
    from calib.data import Examples
    from engines.bundle import Bundle
    from engines.exit_rule import ExitRule
    from engines.runtime import Runtime
    from engines.text import Text
    from exporter.checkpoint import MethodCheckpoint

METHODS = ("variator",)
IMPORTED_METHODS = ("variator", "costeff", "theseus")
PRECISIONS: tuple[Literal["fp32", "fp16", "bf16"], ...] = ("fp32", "fp16", "bf16")
DEFAULT_RATIOS = (2, 4, 8)


Name = TypeVar("Name", bound=str)


@dataclass(frozen=True)
class Columns:
    """Which columns of a data file to read; None recognises the usual names."""

    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    target: str | None = None


@dataclass(frozen=True)
class Fit:
    """How a model or its plugins are trained; None keeps the method's own default.

    ``batch_size`` in texts per step, of all processes together; ``max_length`` in tokens. ``epochs`` and ``steps``
    exclude each other. Plugins only: ``loss``; ``separately``, one ratio after the other; ``fresh``, not from plugins
    that are there already; ``start``, from those of another folder; ``span``, merging once before this layer (from 1).
    """

    steps: int | None = None
    max_seconds: float | None = None
    seed: int = 0
    loss: str = "hidden"
    epochs: float | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    max_length: int | None = None
    precision: str = "auto"
    separately: bool = False
    fresh: bool = False
    start: str | Path | None = None
    span: int | None = None


@dataclass(frozen=True)
class Slender:
    """How slender multi-exit models are trained (method costeff); None keeps the method's own default.

    ``preset``: sizes of the paper by name (a6, a4, a2, a2-half, or a2_l12_f256_e128; several with commas), beside or
    in place of ratios. ``joint``: at ratio 1 train the whole model with its exits, and not the exits alone.
    ``pooling``: "cls+mean", or "cls" where exits are to read the first token alone, as published.
    ``heads_per_event``: heads that leave each layer at a time. ``importance_rows``: rows by whose gradients heads and
    neurons are judged.
    """

    preset: str | None = None
    joint: bool = False
    pooling: str | None = None
    heads_per_event: int | None = None
    importance_rows: int | None = None


@dataclass(frozen=True)
class Shared:
    """How a model that shares layers is trained to be run in fewer steps (method ode); None keeps the default.

    ``objective``: "classification", "mlm" or "lm", whatever model and data are for where it is None. ``form`` of a
    step: "block", "sublayer", or "auto" to train both and keep the better. ``fewest_steps``: of each batch the number
    of steps is drawn between this and the model's iterations. ``distance_weight``: of the distance between the final
    states of these and of all iterations. ``plain``: ordinary training, for comparison.

    ``share``: make the model share its layers first, with so many groups of them, ``iterations`` in all.
    ``from_scratch``: take the model's configuration and tokenizer alone. ``exit_heads``: for each ratio, classifiers
    after every step.
    """

    objective: str | None = None
    form: str | None = None
    fewest_steps: int | None = None
    distance_weight: float | None = None
    plain: bool = False
    share: int | None = None
    iterations: int | None = None
    from_scratch: bool = False
    exit_heads: bool = False


@dataclass(frozen=True)
class Modules:
    """How modules for spans of layers are trained (method modular); None keeps the method's own default.

    ``granularities``: for how many layers a module may stand. ``init``: modules start as their span's "first" layer or
    its "last". ``base_epochs``: of fine-tuning the model before, where it does not know the task. ``strategy``:
    "speed-first" or "size-first", which chooses the assemblies of the ratios.
    """

    granularities: Sequence[float] | None = None
    init: str | None = None
    base_epochs: float | None = None
    strategy: str | None = None


@dataclass(frozen=True)
class Assemblies:
    """What is assembled of layers and modules (method modular); None keeps the method's own default.

    ``strategy``: "speed-first", "size-first" or, on data, "calibrated", by which ratios choose. ``more``: assemblies
    beside those of ratios, in a JSON file (name -> {"encoder": [tile sizes], "decoder": [tile sizes]}), or names that
    the checkpoint has, with commas. ``pairs``: variants of every pair of an encoder and a decoder that are built.
    """

    strategy: str | None = None
    more: str | Path | None = None
    pairs: bool = False


@dataclass(frozen=True)
class Rows:
    """Which rows of the training data to use: at most ``limit``, drawn by the seed, or the ``first`` ones."""

    limit: int | None = None
    first: bool = False


@dataclass(frozen=True)
class Saving:
    """Whether to go on with an unfinished run, and after how many steps to save besides every 30 s or so."""

    resume: bool = False
    save_every: int | None = None


@dataclass(frozen=True)
class Device:
    """Which engines to use and how; ``threads`` None lets the backend decide."""

    backend: str = "ort"
    provider: str = "cpu"
    threads: int | None = None


@dataclass(frozen=True)
class Exits:
    """How the thresholds of exits are found: on ``calibration`` data (None: on one half of the data evaluated).

    ``statistic``: "entropy", "max_probability" or "margin". ``per_exit``: a threshold for each exit, not one for all.
    ``temperature``: fit each exit's temperature first.
    """

    calibration: str | Path | None = None
    statistic: str = "entropy"
    per_exit: bool = False
    temperature: bool = False


@dataclass(frozen=True)
class WritingCheck:
    """How texts are written to be compared, by the names of ``engines.options.NAMES``, and the metric that leads.

    ``metric``: "bleu" (for None), "exact_match" or "word_error_rate"; all three are measured.
    """

    metric: str | None = None
    settings: Mapping[str, Any] | None = None


# The defaults.
COLUMNS, FIT, ROWS, SAVING = Columns(), Fit(), Rows(), Saving()
SLENDER, SHARED, MODULES = Slender(), Shared(), Modules()
DEVICE, EXITS, STEPS = Device(), Exits(), Steps()
WRITING, ASSEMBLIES = WritingCheck(), Assemblies()


def quiet(message: str, done: float | None = None, total: float | None = None) -> None:
    """The progress of callers that want none."""


def open_bundle(path: str | Path) -> Bundle:
    """Open and check a bundle; raises BundleError."""
    from engines.bundle import Bundle

    return Bundle.open(path)


def load(
    path: str | Path = "bundle",
    backend: str = "ort",
    threads: int | None = None,
    provider: str = "cpu",
    variants: Sequence[str] | None = None,
) -> Runtime:
    """Open the bundle at ``path`` for answering; needs neither torch nor transformers.

    Raises BundleError for a damaged bundle or one without engines of this backend, DependencyError when the backend's
    library is missing.
    """
    from engines.runtime import Runtime

    return Runtime.open(path, backend=backend, threads=threads, provider=provider, variants=variants)


def inspect(bundle: str | Path = "bundle", target: str | None = None, progress: Progress = quiet) -> dict[str, Any]:
    """The checked manifest; with ``target``, whether the graphs are expected to pass that compiler.

    ``target`` is "tensorrt" or "tensorrt-rtx", and ``bundle`` may then also be an ONNX file. Nothing is built. Where
    tensorrt_rtx is installed, its parser is asked too. Raises InputError for a file that is no ONNX model.
    """
    if target is not None:
        return _checked_for(Path(bundle), target, progress)
    if Path(bundle).is_file():
        hint = "an ONNX file is checked with --target tensorrt"
        raise InputError(describe("inspect", got=bundle, expected="the folder of a bundle", hint=hint))
    return open_bundle(bundle).manifest.model_dump(mode="json")


def _checked_for(path: Path, target: str, progress: Progress) -> dict[str, Any]:
    from exporter.targets.check import Candidate, check
    from exporter.targets.tensorrt import BOTH

    product = choice("target", target, BOTH)
    if path.is_file():
        return check([Candidate(path.stem, path)], product, progress)
    bundle = open_bundle(path)
    manifest = bundle.manifest
    users = {
        key: tuple(name for name, variant in manifest.variants.items() if key in variant.graphs.values())
        for key in manifest.graphs
    }
    graphs = [Candidate(key, bundle.file(graph.path), users[key]) for key, graph in manifest.graphs.items()]
    return check(graphs, product, progress)


def verify(bundle: str | Path = "bundle") -> dict[str, Any]:
    """Read and hash every file; damage is reported, not raised, as long as there is a bundle to look at."""
    from engines.bundle import Problem

    opened: Bundle | None
    try:
        opened = open_bundle(bundle)
    except BundleError as error:
        manifest = Path(bundle) / "manifest.json"
        if not manifest.is_file():
            raise
        opened = _unchecked(Path(bundle))
        problems = opened.verify() if opened is not None else [Problem("manifest.json", str(error))]
    else:
        problems = opened.verify()
    files = len(opened.manifest.files) if opened is not None else 0
    return {"ok": not problems, "files": files, "problems": [vars(problem) for problem in problems]}


def _unchecked(path: Path) -> Bundle | None:
    """A damaged bundle, only to ask what is wrong with it; None when its manifest cannot be read either."""
    from engines.bundle import Bundle
    from engines.bundle_manifest import MAX_BYTES, parse_manifest
    from engines.bundle_paths import FileFault
    from engines.bundle_reader import identity

    root = path.resolve()
    manifest = root / "manifest.json"
    try:
        with manifest.open("rb") as file:
            parsed = parse_manifest(file.read(MAX_BYTES + 1))
        return Bundle(root, parsed, identity(manifest.lstat()))
    except (FileFault, OSError, ValueError):
        return None


# --- making a family -----------------------------------------------------------------------------------------------


def import_checkpoint(
    file: str | Path,
    *,
    backbone: str | Path | None = None,
    output: str | Path = "imported",
    method: str = "variator",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Turn an official file or folder of ``method`` into the checkpoint ``output``.

    ``backbone`` is the model folder that it was made for; costeff needs none, and theseus, of which a plain model is
    made, takes none. Raises InputError for anything that does not fit exactly, in which case nothing was written.
    """
    if choice("method", method, IMPORTED_METHODS) == "theseus":
        if backbone is not None:
            hint = "the folder holds all of its model"
            raise InputError(describe("--backbone", got=backbone, expected="none for theseus", hint=hint))
        progress(f"importing {file}")
        from exporter.importers.theseus import import_theseus

        return import_theseus(file, output).document()
    if method == "costeff":
        progress(f"importing {file}")
        from exporter.importers.costeff import import_costeff

        return import_costeff(file, backbone, output).document()
    if backbone is None:
        hint = "--backbone names the T5 folder that FILE was made for"
        raise InputError(describe("variator plugins need a backbone", expected="--backbone MODEL", hint=hint))
    progress(f"importing {file}")
    from exporter.importers.variator import import_variator

    return import_variator(file, backbone, output).document()


def build(
    model: str | Path = ".", ratios: Sequence[float] | None = None, output: str | Path = "bundle", **options: Any
) -> Bundle:
    """Build every ratio of ``model`` into the bundle ``output`` and open it; options as of ``build_document``."""
    build_document(model, ratios=ratios, output=output, **options)
    return open_bundle(output)


def build_document(
    model: str | Path = ".",
    *,
    ratios: Sequence[float] | None = None,
    output: str | Path = "bundle",
    backend: str = "ort",
    precision: str = "fp32",
    method: str | None = None,
    exits: Sequence[float] | str | None = None,
    prefix: bool = False,
    steps: Steps = STEPS,
    plans: PlanOptions = PLAN_OPTIONS,
    assemblies: Assemblies = ASSEMBLIES,
    data: str | Path | None = None,
    columns: Columns = COLUMNS,
    fit: Fit = FIT,
    untrained: bool = False,
    command: str = "compexport.build",
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Trace, check and build; with ``data``, plugins that ``model`` lacks are fitted first and kept in its folder.

    ``ratios`` defaults to those ``model`` was trained for, or 2, 4, 8; of methods "ode" and "modular" to those of 2, 3,
    4 and of 1.5, 2, 3, 6 that its layers allow. ``exits``: layers (method "costeff") or steps ("ode") counted from 1 at
    which segments end; costeff also "auto", which ``data`` alone means too. ``prefix`` adds a graph from the ids to
    each of them. ``steps``: method "ode" alone, whose steps are chosen on ``data``. ``assemblies``: "modular" alone.
    ``plans``: backends "trt" and "trt-rtx" alone; where "trt" cannot build here it writes recipes, for
    ``build_recipes``. Raises InputError for bad input, in which case nothing was written, and ParityError when a graph
    differs from PyTorch, in which case no bundle was.
    """
    from compexport import assembling, stepping, training
    from engines import backends
    from exporter import family
    from exporter.checkpoint import find_checkpoint
    from exporter.plans import PLANS, plan_of

    if method is not None:
        choice("method", method, tuple(PLANS))
    arithmetic = choice("precision", precision, PRECISIONS)
    checkpoint = find_checkpoint(model, method)
    planned = plan_of(Path(model), method, checkpoint)
    there = checkpoint.ratios if checkpoint is not None else []
    if ratios is None and planned.method == "ode":
        wanted = stepping.usual_ratios(model, checkpoint, steps.sizes)
    elif ratios is None and planned.method == "modular":
        wanted = assembling.usual_ratios(model, checkpoint)
    elif ratios is None:
        wanted = there or list(DEFAULT_RATIOS)
    else:
        wanted = [*whole_ratios(ratios)] if planned.whole_ratios else checked_ratios(ratios)
    _require_free(output)
    backends.builder(backend, plans, arithmetic)
    _require_meaning(planned.method, exits, prefix, steps, assemblies)
    read = None if data is None else partial(_calibration, data, columns, progress)
    options: dict[str, Any] = {}
    if planned.method == "costeff":
        found = _exits(model, checkpoint, wanted, exits, None if untrained else read, progress)
        options = {"exits": found, "prefixes": prefix}
    elif planned.method == "ode":
        chosen = stepping.plan_options(model, checkpoint, wanted, steps, read, progress)
        options = {**chosen, "exits": _exit_steps(exits), "prefixes": prefix}
    elif planned.method == "modular":
        options = assembling.plan_options(model, checkpoint, wanted, assemblies, read, progress)
    elif data is not None and not untrained and (missing := [ratio for ratio in wanted if ratio not in there]):
        texts = read_examples(data, "train", columns, progress)
        if fit.span is None:
            fit = replace(fit, span=training.span_of(checkpoint))
        training.fit_texts(model, texts, ratios=whole_ratios(missing), output=model, fit=fit, progress=progress)
    report = family.build(
        model,
        wanted,
        output,
        method=planned.method,
        backend=backend,
        plans=plans,
        precision=arithmetic,
        untrained=untrained,
        seed=fit.seed,
        command=command,
        progress=progress,
        **options,
    )
    return report.document()


def build_recipes(bundle: str | Path = "bundle", *, progress: Progress = quiet) -> dict[str, Any]:
    """Build the TensorRT plans that ``bundle`` has recipes of, here, and add them to it; needs no torch.

    Raises BundleError without recipes, DependencyError where the library or the device is missing here too.
    """
    from engines.backends import trt
    from engines.manifest import engine_rows

    manifest = trt.finish_recipes(bundle, progress).manifest
    return {"bundle": str(Path(bundle).resolve()), "engines": engine_rows(manifest)}


def export(
    bundle: str | Path = "bundle", output: str | Path = "exported", variant: str | None = None
) -> dict[str, Any]:
    """Write one variant (by default that of ratio 1), which reads one text and writes another, to a new folder.

    Hugging Face's optimum loads it: ``ORTModelForSeq2SeqLM.from_pretrained(output)``. Raises InputError for another
    task, an unknown variant, and an output that holds something already.
    """
    from compexport.handing_on import export as write

    return write(bundle, output, variant)


def build_method(model: str | Path, method: str | None = None) -> str:
    """Which method ``build`` would take: the one that is named, or that of the checkpoint in ``model``."""
    from exporter.checkpoint import find_checkpoint
    from exporter.plans import plan_of

    return plan_of(Path(model), method, find_checkpoint(model, method)).method


def _exits(
    model: str | Path,
    checkpoint: MethodCheckpoint | None,
    ratios: Sequence[float],
    wanted: Sequence[float] | str | None,
    read: Callable[[], Examples] | None,
    progress: Progress,
) -> dict[float, tuple[int, ...]]:
    """Exits by ratio; none where the default is meant. ``read`` gives rows to choose them on."""
    from compexport.exits import AUTO, chosen_exits, given_exits
    from exporter.plans import PLANS

    if isinstance(wanted, str):
        if wanted != AUTO:
            raise InputError(describe("--exits", got=repr(wanted), expected="layers like 2,4,6, or auto"))
    elif wanted is not None:
        return given_exits(model, wanted, ratios)
    if read is None:
        if wanted is None:
            return {}
        raise InputError(describe("--exits auto chooses on texts", expected="--data FILE, and a trained model"))
    PLANS["costeff"](Path(model), tuple(sorted({1, *ratios})), checkpoint).require_trained()
    return chosen_exits(model, checkpoint, ratios, read(), progress)


def _calibration(data: str | Path, columns: Columns, progress: Progress) -> Examples:
    """Rows to choose on: not those that ``evaluate`` reports on, where there are others."""
    from calib import data as reading

    only_dev = reading.has_split(data, "dev") and not reading.has_split(data, "train")
    return read_examples(data, "dev" if only_dev else "train", columns, progress)


def _exit_steps(wanted: Sequence[float] | str | None) -> tuple[int, ...] | None:
    """``--exits`` of method ode: steps counted from 1, rising; those beyond a ratio's last are left out later."""
    if wanted is None:
        return None
    if isinstance(wanted, str):
        raise InputError(describe("--exits of the method ode", got=repr(wanted), expected="steps like 1,2,4"))
    steps = [int(step) for step in wanted if math.isfinite(step) and step == int(step) and step >= 1]
    if steps != list(wanted) or steps != sorted(set(steps)) or not steps:
        got = ",".join(f"{step:g}" for step in wanted)
        raise InputError(describe("--exits of the method ode are steps", got=got, expected="rising, like 1,2,4"))
    return tuple(steps)


def _require_meaning(method: str, exits: object, prefix: bool, steps: Steps, assemblies: Assemblies) -> None:
    """InputError for an option that means nothing to the method."""
    ode, both, modular = ("ode",), ("costeff", "ode"), ("modular",)
    asked = {
        "exits": (exits is not None, both),
        "prefix": (prefix, both),
        "form": (steps.form is not None, ode),
        "steps": (steps.sizes is not None, ode),
        "step-engine": (steps.engine, ode),
        "strategy": (assemblies.strategy is not None, modular),
        "assemblies": (assemblies.more is not None, modular),
        "pairs": (assemblies.pairs, modular),
    }
    for name, (given, methods) in asked.items():
        if given and method not in methods:
            raise InputError(describe(f"--{name}", got=f"the method {method}", expected=" or ".join(methods)))


def read_examples(
    data: str | Path, split: str, columns: Columns, progress: Progress, limit: int | None = None
) -> Examples:
    """The examples of a file or folder, after saying which columns were taken."""
    from calib import data as reading

    progress(f"reading {data}")
    examples = reading.read(
        data,
        split,
        text=columns.text,
        text_pair=columns.text_pair,
        label=columns.label,
        target=columns.target,
        limit=limit,
    )
    progress(f"{len(examples)} texts of {examples.origin} ({examples.columns_chosen})")
    return examples


def _require_free(output: str | Path) -> None:
    """Refuse an output that is no bundle before minutes are spent on it; nothing is written."""
    from engines.bundle import BundleWriter

    BundleWriter(output)


# --- measuring ---------------------------------------------------------------------------------------------------


def bench(
    bundle: str | Path = "bundle",
    *,
    batches: Sequence[float] = (1, 8),
    lengths: Sequence[float] = (32, 128),
    min_runs: int = 20,
    device: Device = DEVICE,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measure every variant at every batch size and length, keep the table in the bundle, and return it."""
    from compexport import latency
    from engines.manifest import GENERATION

    with _runtime(bundle, device) as runtime:
        tokenizer = runtime.bundle.manifest.tokenizer
        longest, generation = tokenizer.max_length if tokenizer else None, runtime.bundle.manifest.generation
        if generation is not None:  # one more token is timed after each length, where both are one text
            more = 1 if runtime.bundle.manifest.task == GENERATION else 0
            longest = min(longest or generation.positions, generation.positions - more)
        checked = latency.check_sizes("length", lengths, longest)
        table = latency.measure(
            runtime,
            latency.check_sizes("batch", batches),
            checked,
            threads=device.threads,
            min_runs=min_runs,
            progress=progress,
        )
        runtime.bundle.save_profile(runtime.device, table)
    return table


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    columns: Columns = COLUMNS,
    limit: int | None = None,
    exits: Exits = EXITS,
    writing: WritingCheck = WRITING,
    device: Device = DEVICE,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """Measure the quality of every variant on ``data``, keep the table in the bundle, and return the rows.

    Without labels the backbone's own answers are the truth. Variants with exits get named operating points, found as
    ``exits`` says and measured on other rows than those they were found on. Written texts are compared as ``writing``
    says, and how long they are is kept too.
    """
    open_bundle(bundle)  # a wrong bundle is said before a large file is read
    examples = read_examples(data, "dev or test", columns, progress, limit)
    return evaluate_examples(
        bundle, examples, columns=columns, exits=exits, writing=writing, device=device, progress=progress
    )


def evaluate_examples(
    bundle: str | Path,
    examples: Examples,
    *,
    columns: Columns = COLUMNS,
    exits: Exits = EXITS,
    writing: WritingCheck = WRITING,
    device: Device = DEVICE,
    progress: Progress = quiet,
) -> dict[str, Any]:
    """``evaluate`` on examples already read; ``columns`` are those of the calibration data."""
    from calib import quality
    from calib.exits_search import Search

    search = Search(exits.statistic, exits.per_exit, exits.temperature)
    calibration = None
    if exits.calibration is not None:
        calibration = read_examples(exits.calibration, "dev", columns, progress)
    with _runtime(bundle, device) as runtime:
        evaluation = quality.evaluate(
            runtime,
            examples,
            calibration=calibration,
            search=search,
            metric=writing.metric,
            settings=writing.settings,
            progress=progress,
        )
        runtime.bundle.save_quality(evaluation.table)
    return evaluation.document()


# --- answering -----------------------------------------------------------------------------------------------------


def select(
    bundle: str | Path = "bundle",
    *,
    budget_ms: float | None,
    batch: int = 1,
    length: int | None = None,
    settings: Mapping[str, Any] | None = None,
    device: Device = DEVICE,
) -> dict[str, Any]:
    """Which variant would answer ``batch`` sequences of ``length`` tokens, and why each other one lost.

    ``settings``: how texts are written, in a bundle that writes some, by the names of ``engines.options.NAMES``.
    """
    with _runtime(bundle, device) as runtime:
        return runtime.select(batch=batch, length=length, budget_ms=budget_ms, settings=settings).document()


def run(
    bundle: str | Path,
    texts: Sequence[Text],
    *,
    budget_ms: float | None = None,
    ratio: float | None = None,
    variant: str | None = None,
    rule: ExitRule | None = None,
    settings: Mapping[str, Any] | None = None,
    truncate: bool = True,
    show: Callable[[str], None] | None = None,
    device: Device = DEVICE,
) -> dict[str, Any]:
    """Answer ``texts`` together; arguments and errors as ``Runtime.run_batch``.

    ``show`` is told a text that is written, piece by piece as it comes: then there may be one only, and no ``rule``.
    """
    if not texts:
        raise InputError(describe("nothing to run", expected='--text "..."'))
    asked: dict[str, Any] = {"budget_ms": budget_ms, "ratio": ratio, "variant": variant, "settings": settings}
    if show is not None and (len(texts) > 1 or rule is not None):
        got = f"{len(texts)} texts" if rule is None else "exit thresholds"
        raise InputError(describe("a text that is shown as it comes", got=got, expected="one text to be written"))
    with _runtime(bundle, device) as runtime:
        if show is None:
            return runtime.run_batch(texts, rule=rule, truncate=truncate, **asked).document()
        stream = runtime.stream(texts[0], truncate=truncate, **asked)
        for piece in stream:
            show(piece)
        assert stream.batch is not None
        return stream.batch.document()


def exit_rule(thresholds: Sequence[float] | None, statistic: str | None, mode: str | None) -> ExitRule | None:
    """The rule that thresholds, one or one for each exit but the last, make; None without any."""
    from engines.exit_rule import ENTROPY, PER_ROW, ExitRule, thresholds_of

    if thresholds is None:
        for option, given in (("--statistic", statistic), ("--exit-mode", mode)):
            if given is not None:
                raise InputError(describe(f"{option} without a threshold", got=given, expected="--threshold too"))
        return None
    return ExitRule(thresholds_of(thresholds), statistic or ENTROPY, mode or PER_ROW)


def paired(texts: Sequence[str], seconds: Sequence[str] | None) -> list[Text]:
    """Texts, or pairs when there is a second text for every one of them."""
    if not seconds:
        return list(texts)
    if len(seconds) != len(texts):
        expected = f"{len(texts)}, one for every --text"
        raise InputError(describe("--text-pair does not match", got=f"{len(seconds)} of them", expected=expected))
    return list(zip(texts, seconds, strict=True))


def _runtime(bundle: str | Path, device: Device) -> Runtime:
    return load(bundle, device.backend, device.threads, device.provider)


# --- checks of what was asked --------------------------------------------------------------------------------------


def whole_ratios(ratios: Sequence[float]) -> list[int]:
    """Ratios of a method that groups whole tokens, checked; 1, the backbone, is always built and may be left out."""
    for ratio in ratios:
        if not math.isfinite(ratio) or ratio != int(ratio):
            raise InputError(describe("--ratio must be whole for variator", got=f"{ratio:g}", expected="like 2,4,8"))
    return [int(ratio) for ratio in checked_ratios(ratios) if ratio != 1]


def checked_ratios(ratios: Sequence[float]) -> list[float]:
    """Ratios, checked; whole ones as int."""
    from exporter.checkpoint import plain_ratio

    checked: list[float] = []
    for ratio in ratios:
        if not (math.isfinite(ratio) and ratio >= 1):
            raise InputError(describe("--ratio is too small", got=f"{ratio:g}", expected="1 or more, like 2,4,8"))
        if ratio in checked:
            raise InputError(describe("--ratio is there twice", got=f"{ratio:g}", expected="each ratio once"))
        checked.append(plain_ratio(ratio))
    return checked


def choice(what: str, got: str, choices: Sequence[Name]) -> Name:
    for one in choices:
        if one == got:
            return one
    raise InputError(describe(f"unknown {what}", got=got, expected=" or ".join(choices)))
