"""Modular Transformers: an encoder-decoder model and modules that stand for spans of its layers.

In the spirit of Modular Transformers (arXiv 2306.02379), of which no code was published: a module is one ordinary
layer that learnt to stand for g consecutive layers. Which modules there are, how they start and how they are put
together is ours (docs/modular.md).
Letters: B batch, n source tokens, t target tokens, a heads, L layers of a stack, g layers of a span.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

from torch import Tensor, nn

from compexport.errors import InputError, describe
from exporter.backbone import Seq2Seq
from exporter.methods import modular_cache
from exporter.methods.assembly import (
    GRANULARITIES,
    STACKS,
    Assembly,
    AssemblyCost,
    ModularFacts,
    Stack,
    StackFacts,
    cost,
    spans,
    usable_granularities,
)
from exporter.methods.modular_scores import SCORES

InitRule = Literal["first", "last"]
INIT_RULES: tuple[InitRule, ...] = get_args(InitRule)
_NUMBERS = itertools.count()  # of models in this process, to tell their caches apart


class ModularModel(nn.Module):
    """A base and its modules; ``assemble`` makes models of fewer layers of them. The base is never changed.

    ``init_rule``: whether a module starts as a copy of its span's first layer or of its last. The base is frozen and
    the modules are not: they are all that ``module_parameters`` yields.
    """

    def __init__(
        self,
        base: Seq2Seq,
        granularities: Iterable[int] = GRANULARITIES,
        init_rule: InitRule = "first",
    ) -> None:
        super().__init__()
        if init_rule not in INIT_RULES:
            raise InputError(describe("init rule", got=repr(init_rule), expected=" or ".join(INIT_RULES)))
        self.host, self.init_rule = base.host, init_rule
        self._number = next(_NUMBERS)
        self.source = base
        self.base = base.model
        self.facts = facts_of(base, granularities)
        self.module_stacks = nn.ModuleDict({name: self._modules_of(name) for name in STACKS})

    def _modules_of(self, name: Stack) -> nn.ModuleDict:
        layers = self.host.layers_of(self._stack(name))
        sizes = self.facts.stack(name).granularities
        made = {
            f"g{size}": nn.ModuleList(
                self._module_from(layers[start if self.init_rule == "first" else start + size - 1])
                for start in range(0, len(layers), size)
            )
            for size in sizes
        }
        return nn.ModuleDict(made)

    def _module_from(self, layer: nn.Module) -> nn.Module:
        configs = {id(part.config): part.config for part in layer.modules() if hasattr(part, "config")}
        made = copy.deepcopy(layer, dict(configs))  # configurations stay those of the base
        self.host.leave_out(made)
        return made.requires_grad_(True)

    def _stack(self, name: Stack) -> Any:
        return self.host.stacks(self.base)[STACKS.index(name)]

    # --- the modules

    def module_parameters(self) -> Iterator[nn.Parameter]:
        """What is trained."""
        return self.module_stacks.parameters()

    def module_tensors(self) -> dict[str, Tensor]:
        """``modules.{encoder|decoder}.g{g}.{j}.<suffix of a layer>`` -> tensor, as a checkpoint stores them."""
        return _prefixed(self.module_stacks.state_dict())

    def load_module_tensors(self, tensors: Mapping[str, Tensor], origin: str) -> None:
        """Take over stored tensors; InputError names the first that is missing, left over or misshapen."""
        expected = {name: tuple(tensor.shape) for name, tensor in self.module_tensors().items()}
        for name in sorted(expected.keys() | tensors.keys()):
            got = tuple(tensors[name].shape) if name in tensors else "nothing"
            if got != expected.get(name):
                raise InputError(describe(f"{origin}: {name}", got=got, expected=expected.get(name, "no such tensor")))
        self.module_stacks.load_state_dict({name.removeprefix("modules."): t.float() for name, t in tensors.items()})

    def tile(self, name: Stack, start: int, size: int) -> nn.Module:
        """The layer, or for ``size`` > 1 the module, that stands for ``size`` layers from ``start`` on, from 0."""
        if size == 1:
            return self.host.layers_of(self._stack(name))[start]
        sizes: Any = self.module_stacks[name]
        found: nn.Module = sizes[f"g{size}"][start // size]
        return found

    # --- assembling

    def assemble(self, assembly: Assembly, *, observed: bool = False) -> Any:
        """A transformers model of the base's class, in eval mode, that runs the assembly's tiles in order.

        It has no tensor of its own: parameters are those of the base and of the modules, so training it trains them,
        and moving it moves them. Its layers are numbered from 0 in each stack, as its caches are; its configuration
        says how many there are, and ``save_pretrained`` writes an ordinary shorter model. T5's table of relative
        positions is taken out of block 0 and given to whatever tile comes first.

        ``observed``: for distillation, ``output_attentions`` then gives scores [B,a,t,n] before mask and softmax (see
        :mod:`exporter.methods.modular_scores`), and ``output_hidden_states`` the embeddings and every tile's output,
        none of them normalised by the stack's last norm.

        InputError for an assembly that does not fit, and, from its decoder, for a cache of another one.
        """
        assembly.require_fit(self.facts)
        stacks = [self._stack(name) for name in STACKS]
        memory = _shared_tensors(self)
        memory |= {id(self.host.layers_of(stack)): nn.ModuleList() for stack in stacks}
        model = copy.deepcopy(self.base, memory)
        for name, base, stack in zip(STACKS, stacks, self.host.stacks(model), strict=True):
            stack.layerdrop = 0.0  # BART's; a tile that is skipped stands for nothing
            layers = self.host.layers_of(stack)
            for index, (start, size) in enumerate(spans(assembly.stack(name))):
                tile = copy.deepcopy(self.tile(name, start, size), memory)
                for attention in self.host.attentions(tile):
                    attention.layer_idx = index
                layers.append(tile)
            self.host.take_in(base, layers[0])
        self.host.resize(model, len(assembly.encoder), len(assembly.decoder))
        _forget_hooks(model)
        decoder = self.host.stacks(model)[1]
        modular_cache.guard_cache(decoder, len(assembly.decoder), (self._number, assembly), str(assembly))
        if observed:
            _observe(model)
        return model.eval()

    def source_names(self, model: nn.Module) -> dict[str, str]:
        """Name of a tensor of an assembled model -> its name in the base or among the modules' stored tensors."""
        stored = {**self.base.state_dict(keep_vars=True), **_prefixed(self.module_stacks.state_dict(keep_vars=True))}
        names: dict[int, str] = {}
        for name, tensor in stored.items():
            names.setdefault(id(tensor), name)
        return {name: names[id(tensor)] for name, tensor in model.state_dict(keep_vars=True).items()}

    def cost(self, assembly: Assembly) -> AssemblyCost:
        """Parameters and MACs of an assembly."""
        return cost(self.facts, assembly.require_fit(self.facts))


def facts_of(base: Seq2Seq, granularities: Iterable[int] = GRANULARITIES) -> ModularFacts:
    """What assemblies of this base are chosen by; InputError if no span of either stack could be a module's."""
    wanted = tuple(granularities)
    encoder, decoder = (_stack_facts(base, index, wanted) for index in range(len(STACKS)))
    if not (encoder.granularities or decoder.granularities):
        got = f"{encoder.layers} and {decoder.layers} layers"
        expected = f"a multiple of one of {', '.join(map(str, sorted(wanted)))}"
        raise InputError(describe(f"{base.folder}: too few layers for modules", got=got, expected=expected))
    layers = sum(stack.layers * stack.layer_params for stack in (encoder, decoder))
    return ModularFacts(encoder, decoder, base.params - layers, int(base.config.vocab_size))


def _stack_facts(base: Seq2Seq, index: int, wanted: Iterable[int]) -> StackFacts:
    layers = base.host.layers_of(base.host.stacks(base.model)[index])
    module = copy.deepcopy(layers[0])
    base.host.leave_out(module)
    return StackFacts(
        layers=len(layers),
        granularities=usable_granularities(len(layers), wanted),
        layer_params=sum(parameter.numel() for parameter in module.parameters()),
        hidden=int(base.config.d_model),
        inner=base.host.inner(base.config),
        feed_forward=base.host.feed_forward(base.config, index),
    )


def _prefixed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"modules.{name}": tensor for name, tensor in tensors.items()}


def _shared_tensors(model: nn.Module) -> dict[int, Any]:
    """A memory for ``deepcopy`` that makes it share parameters and buffers instead of copying them."""
    return {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}


def _forget_hooks(model: nn.Module) -> None:
    """transformers records outputs by hooks, once per model; a copy of some hooked and some bare layers needs all."""
    for part in model.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part.__dict__.pop("_output_capturing_hooks_installed", None)


def _observe(model: Any) -> None:
    configs = {id(part.config): part.config for part in model.modules() if hasattr(part, "config")}
    for config in configs.values():
        config._attn_implementation = SCORES
        config.tie_last_hidden_states = False


__all__ = [
    "GRANULARITIES",
    "INIT_RULES",
    "Assembly",
    "AssemblyCost",
    "InitRule",
    "ModularFacts",
    "ModularModel",
    "facts_of",
]
