"""Modular models in method checkpoints: one file with all modules, whatever is assembled of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from compexport.errors import InputError, describe
from exporter.backbone import Seq2Seq, load_seq2seq
from exporter.checkpoint import MethodCheckpoint, find_checkpoint, save_checkpoint
from exporter.methods.assembly import STACKS, Assembly
from exporter.methods.modular import INIT_RULES, InitRule, ModularModel, facts_of
from exporter.methods.modular_settings import METHOD, ModularSettings


def save_modular(
    folder: str | Path,
    model: ModularModel,
    *,
    training: Mapping[str, Any] | None = None,
    assemblies: Mapping[str, Assembly] | None = None,
) -> MethodCheckpoint:
    """Write the base's folder and the modules to ``folder``; InputError as save_checkpoint, and for a misfit."""
    named = dict(assemblies or {})
    for name, assembly in named.items():
        assembly.require_fit(model.facts, f"assembly {name}")
    settings = ModularSettings(model.facts, model.init_rule, training or {}, named)
    return save_checkpoint(folder, model.source.folder, METHOD, settings.document(), for_all=model.module_tensors())


def load_modular(folder: str | Path, *, attention: str = "eager") -> ModularModel:
    """The base and its modules, in eval mode; InputError where file, description and base do not agree."""
    checkpoint = find_checkpoint(folder, METHOD)
    if checkpoint is None:
        hint = "fit modules with `compexport train modular`"
        raise InputError(describe(f"{folder}: no modules", got="a bare model", hint=hint))
    base = load_seq2seq(folder, attention=attention)
    settings = ModularSettings.of(checkpoint)
    _require_its_base(base, settings)
    model = ModularModel(base, _sizes(settings), _init_rule(settings, folder))
    model.load_module_tensors(checkpoint.load(), f"{checkpoint.folder / str(checkpoint.file)}")
    return model.eval()


def untrained_modular(base: Seq2Seq, seed: int) -> ModularModel:
    """Modules with noise on what they start from: as fast as trained ones, and of no use."""
    model = ModularModel(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.module_parameters():
            scale = parameter.std(correction=0)
            parameter += 0.1 * scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def _sizes(settings: ModularSettings) -> list[int]:
    return sorted({size for name in STACKS for size in settings.facts.stack(name).granularities})


def _require_its_base(base: Seq2Seq, settings: ModularSettings) -> None:
    found = facts_of(base, _sizes(settings))
    if found != settings.facts:
        expected = f"those of its model, {found.document()}"
        raise InputError(
            describe(f"{base.folder}/compexport.json: facts", got=settings.facts.document(), expected=expected)
        )


def _init_rule(settings: ModularSettings, folder: str | Path) -> InitRule:
    for rule in INIT_RULES:
        if rule == settings.init_rule:
            return rule
    expected = " or ".join(INIT_RULES)
    raise InputError(describe(f"{folder}/compexport.json: init rule", got=settings.init_rule, expected=expected))
