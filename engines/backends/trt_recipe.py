"""What to do on the machine with the GPU, where this one cannot build plans: a recipe per graph, and finishing them.

An engine folder ``trt-recipe`` holds ``<graph>.json``, from which `compexport build --from-recipe` builds the plan, and
for those who would rather use NVIDIA's own tools ``<graph>.sh`` with trtexec's line (TensorRT alone) and ``<graph>.py``
for Polygraphy. Nothing here is ever executed by us.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

from compexport.errors import BundleError, InputError, describe
from engines.backends.trt_maker import PlanMaker, Progress, order_of, sources_sha256, with_ranges
from engines.backends.trt_options import PlanOptions
from engines.backends.trt_plan import Recipe, read_recipe
from engines.backends.trt_product import Product
from engines.bundle import Bundle, BundleWriter
from engines.manifest import Engine, Graph
from engines.plugins import ptx

ANY_DEVICE = "any"
_SUFFIX = "-recipe"
_SCRIPT = "trt_recipe.py.template"
_SOURCES = ("trt_recipe.py", _SCRIPT, "trt_maker.py", "trt_profiles.py")
_TIMINGS = "timing.cache"  # in the folder where the scripts are run: one for all graphs


class RecipeMaker:
    """Writes recipes as ``trt_maker.PlanMaker`` builds plans. ``reason``: why no plan is built, if one was wanted."""

    RUNS_HERE = False

    def __init__(self, product: Product, options: PlanOptions, reason: str) -> None:
        self.product, self.options, self.reason = product, options, reason
        self.NAME = product.name + _SUFFIX
        self.FOLDER = f"engines/{self.NAME}"
        finishing = "where there is a GPU, `compexport build --from-recipe BUNDLE` builds plans from them"
        self.NOTE = f"{reason}; recipes are written instead: {finishing}" if reason else ""

    def version(self) -> str:
        """The oldest version of the library that will do."""
        return f">={self.product.oldest}"

    def engine_key(self, graph_key: str) -> str:
        """Hash of what a recipe depends on."""
        facts = (graph_key, self.NAME, str(self.options), sources_sha256(*_SOURCES))
        return hashlib.sha256("\0".join(facts).encode()).hexdigest()

    def EngineBuilder(
        self, root: Path, folder: str, longest: int | None = None, previous: Bundle | None = None
    ) -> RecipeBuilder:
        """A builder of the bundle staged at ``root``; ``longest``: tokens that its graphs take."""
        return RecipeBuilder(self, root, folder, longest)


class RecipeBuilder:
    """Writes the recipes of a staged bundle; a context manager as all builders are."""

    def __init__(self, maker: RecipeMaker, root: Path, folder: str, longest: int | None) -> None:
        self._maker, self._root, self._folder = maker, root, folder
        self._options = with_ranges(maker.options, longest)
        self._engines: dict[str, Engine] = {}

    def add(self, name: str, graph: Graph) -> None:
        """Write the recipe of a graph; InputError for an axis without a range."""
        maker = self._maker
        order = order_of(maker.product, name, graph, self._options)
        recipe = Recipe(**order.model_dump(), minimum_version=maker.product.oldest, onnx=graph.path)
        texts = {".json": recipe.model_dump_json(indent=1) + "\n", ".py": _polygraphy(recipe)}
        if maker.product.name == "trt" and not maker.options.plugins:  # trtexec knows no plugins of Python's
            texts[".sh"] = _trtexec(recipe)
        (self._root / self._folder).mkdir(parents=True, exist_ok=True)
        for suffix, text in texts.items():
            (self._root / f"{self._folder}/{name}{suffix}").write_text(text, encoding="utf-8")
        self._engines[name] = Engine(
            graph=name,
            backend=maker.NAME,
            backend_version=maker.version(),
            device=ANY_DEVICE,
            path=f"{self._folder}/{name}.json",
            files=[f"{self._folder}/{name}{suffix}" for suffix in texts],
            key=maker.engine_key(graph.key),
        )

    def finish(self, progress: Progress) -> dict[str, Engine]:
        """The recipes by graph name."""
        progress(f"writing recipes for {self._maker.product.title}")
        return self._engines

    def __enter__(self) -> RecipeBuilder:
        return self

    def __exit__(self, *exception: object) -> None:
        pass


# --- for NVIDIA's own tools ----------------------------------------------------------------------------------------


def _trtexec(recipe: Recipe) -> str:
    """A shell script of one trtexec command; the plan goes to its argument, by default into the current folder."""
    options = recipe.options
    words = ["--skipInference", f"--timingCacheFile={_TIMINGS}"]
    for number, profile in enumerate(recipe.profiles):
        words.append(f"--profile={number}")
        for index, end in enumerate(("min", "opt", "max")):
            shapes = (f"{name}:{'x'.join(map(str, sizes[index]))}" for name, sizes in profile.items())
            words.append(f"--{end}Shapes={','.join(shapes)}")
    if options["workspace_mib"] is not None:
        words.append(f"--memPoolSize=workspace:{options['workspace_mib']}")
    if options["level"] is not None:
        words.append(f"--builderOptimizationLevel={options['level']}")
    switches = {
        "strip": "--stripWeights",
        "version_compatible": "--versionCompatible",
        "hardware_compatible": "--hardwareCompatibilityLevel=ampere+",
        "detailed": "--profilingVerbosity=detailed",
    }
    words += [word for name, word in switches.items() if options[name]]
    lines = [
        "#!/bin/sh",
        f"# TensorRT {recipe.minimum_version} or newer: the plan of {recipe.graph}. Usage: sh {recipe.graph}.sh [PLAN]",
        'here=$(cd "$(dirname "$0")" && pwd)',
        f'exec trtexec --onnx="$here/../../{recipe.onnx}" --saveEngine="${{1:-{recipe.graph}.plan}}" \\',
        " \\\n".join(f"    {shlex.quote(word)}" for word in words),
    ]
    return "\n".join(lines) + "\n"


def _polygraphy(recipe: Recipe) -> str:
    """A Python script that builds the plan with Polygraphy."""
    options = recipe.options
    arguments = {
        "memory_pool_limits": f"{{trt.MemoryPoolType.WORKSPACE: {options['workspace_mib']} << 20}}",
        "builder_optimization_level": str(options["level"]),
        "strip_plan": "True",
        "version_compatible": "True",
        "hardware_compatibility_level": "trt.HardwareCompatibilityLevel.AMPERE_PLUS",
    }
    wanted = (options["workspace_mib"], options["level"], options["strip"], options["version_compatible"])
    given = (*(value is not None and value is not False for value in wanted), options["hardware_compatible"])
    chosen = [f"{name}={text}" for (name, text), use in zip(arguments.items(), given, strict=True) if use]
    profiles = [
        {name: [tuple(sizes) for sizes in shapes] for name, shapes in profile.items()} for profile in recipe.profiles
    ]
    return Template(_script()).substitute(
        graph=recipe.graph,
        minimum=recipe.minimum_version,
        onnx=recipe.onnx,
        rtx=recipe.product == "trt-rtx",
        module="tensorrt_rtx" if recipe.product == "trt-rtx" else "tensorrt",
        profiles=repr(profiles),
        verbosity="DETAILED" if options["detailed"] else "LAYER_NAMES_ONLY",
        plugins=_registering(options),
        arguments="".join(f", {argument}" for argument in chosen),
        targets=repr(options["targets"] or []),
    )


def _registering(options: dict[str, Any]) -> str:
    """Statements that make the plugins known, where they are wanted; they need this package."""
    if not options["plugins"]:
        return ""
    capability = ptx.PORTABLE if options["hardware_compatible"] else ""
    return f"from engines.plugins import merge  # of compexport\n\nmerge.register({capability})\n"


def _script() -> str:
    return (files(__package__) / _SCRIPT).read_text(encoding="utf-8")


# --- finishing -----------------------------------------------------------------------------------------------------


def finish(path: str | Path, maker_of: Callable[[str, PlanOptions], PlanMaker], progress: Progress) -> Bundle:
    """Build the plans of all recipes in the bundle at ``path`` and add them to it; the recipes stay for other machines.

    ``maker_of``: from product name and options to a ``trt_maker.PlanMaker``. Raises BundleError without recipes and
    whatever building raises, and then the bundle is as it was.
    """
    Bundle.open(path)
    with BundleWriter(path) as writer:
        previous = writer.previous
        assert previous is not None
        manifest = previous.manifest
        recipes = _recipes(previous)
        maker = maker_of(recipes[0].product, _options(recipes[0]))
        kept = {n: e for n, e in manifest.engines.items() if not e.path.startswith(f"{maker.FOLDER}/")}
        for file in sorted(manifest.files.keys() - _files_below(maker.FOLDER, manifest.files)):
            writer.reuse(file)
        with maker.EngineBuilder(writer.dir, maker.FOLDER, previous=previous) as builder:
            for recipe in recipes:
                builder.add(recipe.graph, manifest.graphs[recipe.graph])
            built = builder.finish(progress)
        device = maker.FOLDER.rsplit("/", 1)[1]
        engines = kept | {f"{name}-{device}": engine for name, engine in built.items()}
        versions = {**manifest.versions, maker.NAME: maker.version()}
        return writer.commit(manifest.model_copy(update={"engines": engines, "versions": versions}))


def _files_below(folder: str, names: Any) -> set[str]:
    return {name for name in names if name.startswith(f"{folder}/")}


def _recipes(bundle: Bundle) -> list[Recipe]:
    """The recipes of a bundle, all for one product; BundleError when there are none or a graph has changed."""
    engines = [engine for engine in bundle.manifest.engines.values() if engine.backend.endswith(_SUFFIX)]
    if not engines:
        hint = "`compexport build --backend trt --recipe` writes them"
        raise BundleError(describe(f"{bundle.path}: no recipes", hint=hint))
    recipes = [read_recipe(bundle.file(engine.path)) for engine in engines]
    for engine, recipe in zip(engines, recipes, strict=True):
        if (recipe.product, recipe.options) != (recipes[0].product, recipes[0].options):
            raise BundleError(describe(f"{bundle.path}: recipes of two builds", hint="build with --recipe again"))
        if (recipe.graph, recipe.graph_key) != (engine.graph, bundle.manifest.graphs[engine.graph].key):
            raise BundleError(describe(f"{bundle.path}: the recipe of {engine.graph} is of another graph"))
    return recipes


def _options(recipe: Recipe) -> PlanOptions:
    """What a recipe asks for; BundleError where that is nothing that this version knows."""
    try:
        return PlanOptions.of(recipe.options)
    except (InputError, TypeError, AttributeError) as error:
        raise BundleError(describe(f"the recipe of {recipe.graph}: options", got=error)) from error
