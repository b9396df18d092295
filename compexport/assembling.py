"""``compexport build --strategy``, ``--assemblies`` and ``--pairs``: which assemblies of a modular model are built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.errors import InputError, describe
from compexport.present import Progress

if TYPE_CHECKING:
    from calib.data import Examples
    from compexport.api import Assemblies
    from exporter.checkpoint import MethodCheckpoint
    from exporter.methods.assembly import Assembly, Strategy

_EXPECTED = 'a JSON file, {"name": {"encoder": [tile sizes], "decoder": [tile sizes]}}, or names with commas'


def plan_options(
    model: str | Path,
    checkpoint: MethodCheckpoint | None,
    ratios: Sequence[float],
    asked: Assemblies,
    read: Callable[[], Examples] | None,
    progress: Progress,
) -> dict[str, Any]:
    """Options of the method's plan. ``read`` gives pairs of texts to choose on; None where there are none.

    InputError for a strategy or assemblies that there are not, and for data that are missing or of no use.
    """
    from exporter.plans.modular import CALIBRATED

    named = {} if asked.more is None else named_assemblies(checkpoint, asked.more)
    options: dict[str, Any] = {"named": named, "pairs": asked.pairs}
    if asked.strategy != CALIBRATED:
        _require_no_data(read)
        return {**options, "strategy": _strategy(asked.strategy)}
    if read is None:
        raise InputError(describe(f"--strategy {CALIBRATED} chooses on texts and targets", expected="--data FILE"))
    return {**options, "chosen": _chosen(model, ratios, read, progress)}


def _chosen(
    model: str | Path, ratios: Sequence[float], read: Callable[[], Examples], progress: Progress
) -> dict[float, Assembly]:
    """For each ratio beside 1, the assembly that loses least on what is read."""
    from calib.tiles import assemblies_on
    from exporter.methods.modular_checkpoint import load_modular

    modular = load_modular(model)
    examples = read()
    if examples.targets is None:
        what = f"{examples.origin}: no targets, by which an assembly is chosen"
        raise InputError(describe(what, expected="a column named target"))
    chosen = assemblies_on(modular, examples, sorted({ratio for ratio in ratios if ratio != 1}), progress)
    for ratio, assembly in chosen.items():
        progress(f"ratio {ratio:g}: {assembly}")
    return chosen


def _strategy(name: str | None) -> Strategy:
    from exporter.methods.assembly import STRATEGIES
    from exporter.plans.modular import CALIBRATED

    if name is None:
        return "speed-first"
    for known in STRATEGIES:
        if name == known:
            return known
    expected = " or ".join((*STRATEGIES, CALIBRATED))
    raise InputError(describe("--strategy", got=repr(name), expected=expected))


def named_assemblies(checkpoint: MethodCheckpoint | None, more: str | Path) -> dict[str, Assembly]:
    """Those of a file, or those of the checkpoint that are named; whether they fit the model says the plan."""
    from exporter.methods.assembly import Assembly

    if Path(more).is_file():
        return {name: Assembly.from_document(one, f"{more}: {name}") for name, one in _read(Path(more)).items()}
    known = _of_checkpoint(checkpoint)
    names = [name.strip() for name in str(more).split(",")]
    missing = [name for name in names if name not in known]
    if missing:
        if Path(more).suffix == ".json" or Path(more).is_dir():
            found = "a folder" if Path(more).is_dir() else "no such file"
            raise InputError(describe(f"--assemblies {more}", got=found, expected=_EXPECTED))
        has = f"the checkpoint has {', '.join(known)}" if known else "the checkpoint has none by name"
        raise InputError(describe(f"--assemblies {more}", got=repr(missing[0]), expected=_EXPECTED, hint=has))
    return {name: known[name] for name in names}


def _of_checkpoint(checkpoint: MethodCheckpoint | None) -> Mapping[str, Assembly]:
    from exporter.methods.modular_settings import METHOD, ModularSettings

    if checkpoint is None or checkpoint.method != METHOD:
        return {}
    return ModularSettings.of(checkpoint).assemblies


def _read(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(describe(f"--assemblies {path}: unreadable", got=error, expected="JSON")) from error
    if not isinstance(document, dict) or not document:
        raise InputError(describe(f"--assemblies {path}", got=type(document).__name__, expected=_EXPECTED))
    if set(document) == {"encoder", "decoder"} and isinstance(document["encoder"], list):
        raise InputError(describe(f"--assemblies {path}", got="an assembly without a name", expected=_EXPECTED))
    return document


def usual_ratios(model: str | Path, checkpoint: MethodCheckpoint | None) -> list[float]:
    """The ratios that were measured after training, else the usual ones that the model's layers allow."""
    from exporter.checkpoint import plain_ratio
    from exporter.methods.assembly import usual_ratios
    from exporter.plans.modular import ModularPlan

    measured = checkpoint.settings.get("training", {}).get("ratios") if checkpoint is not None else None
    if isinstance(measured, list) and measured:
        return [plain_ratio(ratio) for ratio in measured]
    return usual_ratios(ModularPlan(Path(model), (1,), checkpoint).facts_of_base)


def _require_no_data(read: object) -> None:
    """InputError where data are given, by which only one strategy chooses."""
    if read is not None:
        hint = "--strategy calibrated chooses on them; modules are trained by `compexport train modular`"
        raise InputError(describe("--data", got="the method modular", expected="none", hint=hint))
