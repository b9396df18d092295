"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def _load_config(context: typer.Context, given: Path | None) -> Path | None:
    """Take the command's table of the configuration file as defaults of its options."""
    from compexport import config

    path = config.find(given)
    if path is not None:
        context.default_map = config.read(path).get(context.info_name or "", {})
    return path


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
Provider = Annotated[str, typer.Option(metavar="NAME", help="ONNX Runtime provider: cpu, cuda or cuda-graphs.")]
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
