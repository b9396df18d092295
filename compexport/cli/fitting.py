"""Verbs that end with a model folder: ``train`` and ``import``."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from compexport.cli.options import (
    Config,
    Data,
    Debug,
    Json,
    LabelColumn,
    MaxSeconds,
    Model,
    PairColumn,
    Seed,
    TargetColumn,
    TextColumn,
    TrainRatio,
)
from compexport.cli.screens import opened_screen
from compexport.cli.typed import numbers_of, own_value
from compexport.errors import InputError, describe


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
    own = partial(own_value, context, training.foreign_options(method))
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
        granularities=None if sizes is None else numbers_of("granularities", sizes, "numbers like 2,3,4,6"),
        init=own("init", init, None),
        base_epochs=own("base_epochs", base_epochs, None),
        strategy=own("strategy", strategy, None),
    )
    ratio = own("ratio", ratio, None)
    with opened_screen(as_json) as screen, present.progress() as progress:
        document = training.train(
            model,
            data,
            ratios=None if ratio is None else numbers_of("ratio", ratio),
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

    with opened_screen(as_json) as screen, present.progress() as progress:
        document = api.import_checkpoint(file, backbone=backbone, output=output, method=method, progress=progress)
    screen.document(document, [tables.import_table(document)])
