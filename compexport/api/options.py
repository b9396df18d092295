"""What the verbs can be told beyond their names and paths; None keeps a default, each class says which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compexport.stepping import Steps


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
