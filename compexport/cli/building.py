"""The verb ``build``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from compexport.cli.options import (
    Backend,
    BuildSteps,
    Config,
    Data,
    Debug,
    FromRecipe,
    Json,
    MaxSeconds,
    Model,
    PairColumn,
    PlanBatch,
    PlanDetailed,
    PlanHardware,
    PlanLength,
    PlanLevel,
    PlanPlugins,
    PlanRecipe,
    PlanStrip,
    PlanTarget,
    PlanVersions,
    PlanWorkspace,
    Ratio,
    Seed,
    TextColumn,
)
from compexport.cli.screens import opened_screen
from compexport.cli.typed import is_of_file, is_typed, numbers_of, own_value, require_alone
from compexport.errors import InputError, describe

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
        require_alone(context, "from_recipe")
        with opened_screen(as_json) as screen, present.progress() as progress:
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
    of_file = {name for name in BUILD_OPTIONS_OF if is_of_file(context, name)}
    takes = api.build_method(model, method) if of_file or steps is not None else method
    foreign = {name for name in of_file if takes not in BUILD_OPTIONS_OF[name]}
    with opened_screen(as_json) as screen, present.progress() as progress:
        document = api.build_document(
            model,
            ratios=None if ratio is None else numbers_of("ratio", ratio),
            output=output,
            backend=backend,
            precision=precision,
            method=method,
            exits=_layers(own_value(context, foreign, "exits", exits, None)),
            prefix=own_value(context, foreign, "prefix", prefix, False),
            data=data,
            columns=api.Columns(text=text, text_pair=text_pair),
            steps=api.Steps(
                form=own_value(context, foreign, "form", form, None),
                sizes=parsed_steps(steps) if steps is not None and takes == "ode" else None,
                engine=own_value(context, foreign, "step_engine", step_engine, False),
            ),
            plans=plans if backend != "ort" or _typed_plan(context) else PLAN_OPTIONS,
            assemblies=api.Assemblies(
                strategy=own_value(context, foreign, "strategy", strategy, None),
                more=own_value(context, foreign, "assemblies", assemblies, None),
                pairs=own_value(context, foreign, "pairs", pairs, False),
            ),
            fit=api.Fit(steps=_training_steps(steps) if takes != "ode" else None, max_seconds=max_seconds, seed=seed),
            untrained=untrained,
            command=_command_line(),
            progress=progress,
        )
    parts = [tables.engines_table(document)] if backend != "ort" else []
    screen.document(document, [tables.build_table(document), *parts])


def _typed_plan(context: typer.Context) -> bool:
    """Whether an option of TensorRT's plans was typed: then another backend refuses it, which it does not in a file."""
    return any(is_typed(context, name) for name in PLAN_PARAMETERS)


def _training_steps(steps: str | None) -> int | None:
    """``--steps`` where it is the length of a fit."""
    if steps is None:
        return None
    if not steps.isdecimal() or int(steps) < 1:
        raise InputError(describe("--steps of a fit", got=repr(steps), expected="a whole number, at least 1"))
    return int(steps)


def _layers(exits: str | None) -> list[float] | str | None:
    """``--exits``: numbers, the word auto, or nothing."""
    return exits if exits in (None, "auto") else numbers_of("exits", exits, "layers like 2,4,6, or auto")


def _command_line() -> str:
    """What was typed, for the manifest; the program's own path is left out."""
    import shlex

    return shlex.join(["compexport", *sys.argv[1:]])
