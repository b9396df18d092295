"""Decoders whose layers are one block many times: which of them are the same, and tying those to one set of weights.

A run of layers is a group: stated by the configuration (``exporter.sharing``), or otherwise layers in a row that hold
equal tensors.
"""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from compexport.errors import InputError, describe
from exporter.hosts.host import Repeated
from exporter.sharing import FIELD, checked_groups


def stated_groups(config: Any, origin: str = "config.json") -> tuple[int, ...] | None:
    """How many layers each group has, as the configuration says; None where it says nothing, InputError if nonsense.

    ``config``: transformers' object.
    """
    stated = getattr(config, FIELD, None)
    if stated is None:
        return None
    return checked_groups(stated, int(config.num_hidden_layers), origin)


def repeated_layers(layers: nn.ModuleList, config: Any) -> list[Repeated]:
    """The groups of a decoder's layers, each with its first layer: stated, or found by comparing tensors."""
    return [Repeated((layers[run[0]],), len(run)) for run in _runs(layers, stated_groups(config))]


def tie(layers: nn.ModuleList, config: Any, missing: Collection[int] = ()) -> None:
    """Give every layer of a group the tensors of its first one; the model computes what it did, with less memory.

    ``missing``: layers whose tensors were not in the file, and are not to be compared. InputError where the
    configuration states a group of which the file holds different tensors.
    """
    for run in _runs(layers, stated_groups(config)):
        first = layers[run[0]]
        for index in run[1:]:
            if index not in missing and not _equal(first, layers[index]):
                expected = f"tensors equal to those of layer {run[0]}, or none"
                raise InputError(describe(f"layer {index} of a shared group", got="other tensors", expected=expected))
            _adopt(layers[index], first)


def repeats(layers: nn.ModuleList, config: Any) -> set[int]:
    """Layers, counted from 0, that are not the first of a group that the configuration states."""
    stated = stated_groups(config)
    return set() if stated is None else {index for run in _runs(layers, stated) for index in run[1:]}


def _runs(layers: nn.ModuleList, stated: tuple[int, ...] | None) -> list[list[int]]:
    if stated is not None:
        ends = [sum(stated[: number + 1]) for number in range(len(stated))]
        return [list(range(first, end)) for first, end in pairwise([0, *ends])]
    runs = [[0]]
    for index in range(1, len(layers)):
        if _equal(layers[runs[-1][0]], layers[index]):
            runs[-1].append(index)
        else:
            runs.append([index])
    return runs


def _equal(one: nn.Module, other: nn.Module) -> bool:
    if one is other:
        return True
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return ours.keys() == theirs.keys() and all(
        tensor is theirs[name] or (tensor.shape == theirs[name].shape and torch.equal(tensor, theirs[name]))
        for name, tensor in ours.items()
    )


def _adopt(layer: nn.Module, first: nn.Module) -> None:
    for (_, mine), (_, other) in zip(layer.named_modules(), first.named_modules(), strict=True):
        for name, parameter in other.named_parameters(recurse=False):
            setattr(mine, name, parameter)
