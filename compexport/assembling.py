"""``compexport build --strategy``, ``--assemblies`` and ``--pairs``: which assemblies of a modular model are built."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compexport.errors import CompexportError, InputError, describe
from compexport.present import Progress

if TYPE_CHECKING:
    from calib.data import Examples
    from compexport.api import Assemblies
    from exporter.checkpoint import MethodCheckpoint
    from exporter.methods.assembly import Assembly, Strategy
    from exporter.methods.assembly_calibrated import LayerTimes

_EXPECTED = 'a JSON file, {"name": {"encoder": [tile sizes], "decoder": [tile sizes]}}, or names with commas'


def plan_options(
    model: str | Path,
    checkpoint: MethodCheckpoint | None,
    ratios: Sequence[float],
    asked: Assemblies,
    read: Callable[[], Examples] | None,
    output: str | Path,
    progress: Progress,
) -> dict[str, Any]:
    """Options of the method's plan. ``read`` gives pairs of texts to choose on; None where there are none.

    ``output``: a bundle that may be there, with times that were measured here.

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
    return {**options, **_chosen(model, ratios, read, output, progress)}


def _chosen(
    model: str | Path, ratios: Sequence[float], read: Callable[[], Examples], output: str | Path, progress: Progress
) -> dict[str, Any]:
    """For each ratio beside 1 the assembly that loses least on what is read, and the model, which is loaded now."""
    from calib.layer_times import layer_times
    from calib.tiles import assemblies_on
    from exporter.methods.modular_checkpoint import load_modular

    modular = load_modular(model)
    examples = read()
    if examples.targets is None:
        what = f"{examples.origin}: no targets, by which an assembly is chosen"
        raise InputError(describe(what, expected="a column named target"))

    def timed(tokens_read: int, written: int) -> LayerTimes:
        there = measured_layers(output, modular.source.sha256, tokens_read, written)
        return there or layer_times(modular, tokens_read, written)

    chosen = assemblies_on(modular, examples, sorted({ratio for ratio in ratios if ratio != 1}), timed, progress)
    for ratio, assembly in chosen.items():
        progress(f"ratio {ratio:g}: {assembly}")
    return {"chosen": chosen, "loaded": modular}


def measured_layers(output: str | Path, backbone_sha256: str, read: int, written: int) -> LayerTimes | None:
    """From what `bench` measured here of a bundle of the same model, by ONNX Runtime on all cores.

    None without such a table, and where it has not two numbers of layers of each stack.
    """
    from engines import backends
    from engines.bundle import Bundle
    from engines.points import encoder_name, first_token_name
    from engines.profile import Profile
    from engines.writing_time import WritingTimes
    from exporter.methods.assembly_calibrated import LayerTimes

    try:
        bundle = Bundle.open(output)
        table = bundle.profile(backends.load("ort").device_name({"threads": None, "provider": "cpu"}))
    except CompexportError:
        return None
    if table is None or bundle.manifest.backbone.sha256 != backbone_sha256:
        return None
    profile = Profile.from_table(table)
    times, encoders, decoders = WritingTimes(profile), {}, {}
    for name, variant in bundle.manifest.variants.items():
        if variant.assembly is None or not {encoder_name(name), first_token_name(name)} <= set(profile.variants):
            continue
        first = profile.predict(first_token_name(name), 1, read)
        encoders[len(variant.assembly["encoder"])] = profile.predict(encoder_name(name), 1, read).p50_ms
        decoders[len(variant.assembly["decoder"])] = (first + times.later_tokens(name, 1, read, written)).p50_ms
    if min(len(encoders), len(decoders)) < 2:
        return None
    return LayerTimes.of_differences(_slope(encoders), _slope(decoders), f"by `bench` of {output}")


def _slope(times_ms: Mapping[int, float]) -> float:
    """What one layer more takes."""
    fewest, most = min(times_ms), max(times_ms)
    return (times_ms[most] - times_ms[fewest]) / (most - fewest)


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
