"""Official Variator files, turned into our method checkpoint.

Two kinds of file are known, both flat pickled dicts name -> tensor: *plugin files* (names ``mux_layer.{i}.…`` only) and
*task checkpoints* (the whole wrapper: ModelCenter's T5 under ``t5.``, plugins, with LoRA also its updates). Either way
the plugins work on a residual stream of 1/100 of Hugging Face's scale; here they are rescaled to the latter.
Source: the official code of Variator (arXiv 2310.15724). Letters: H hidden size, k ratio, r adapter width.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from compexport.errors import InputError, describe
from exporter.backbone import load_backbone, load_config
from exporter.checkpoint import find_checkpoint, save_checkpoint
from exporter.identity import backbone_sha256, file_sha256
from exporter.importers.folder import folder_near, require_no_root, write_config, write_weights
from exporter.importers.modelcenter import (
    EPSILON_HERE,
    EPSILON_THERE,
    SCALE,
    is_t5,
    lora_matrices,
    require_original_t5,
    t5_from_modelcenter,
)
from exporter.importers.tensors import Shape, promoted, read_tensors, require_shapes

_log = logging.getLogger(__name__)

PLUGIN = "mux_layer."
# What a model folder may hold beside its safetensors: the same weights in formats that are not read here.
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx"}


@dataclass(frozen=True)
class Imported:
    """What an import wrote. ``ratio`` is None for a task checkpoint without plugins; ``ratios`` are all in ``output``.

    ``tensors`` counts what was read from the file, ``lora`` the matrices that updates were merged into;
    ``extra_params_share`` is relative to the whole backbone, decoder included.
    """

    method: str
    output: str
    ratio: int | None
    ratios: list[float]
    extra_params: int
    extra_params_share: float
    tensors: int
    lora: int
    backbone: str
    backbone_from_file: bool
    layer_norm_epsilon: float

    def document(self) -> dict[str, Any]:
        return asdict(self)


def import_variator(file: str | Path, backbone: str | Path, output: str | Path) -> Imported:
    """Write the method checkpoint ``output`` from an official file and the T5 folder ``backbone``.

    A plugin file takes its weights from ``backbone``, a task checkpoint brings its own and takes configuration and
    tokenizer only. ``output`` is new, or an earlier import with the same backbone, which gains the ratio or gets it
    replaced. InputError for anything that does not fit, in which case nothing was written.
    """
    file, backbone, output = Path(file), Path(backbone), Path(output)
    require_no_root(output)
    config = load_config(backbone)
    require_original_t5(config, backbone)
    tensors = read_tensors(file)
    plugins, t5 = _sorted(tensors, file)
    converted = plugins_from_official(plugins, config.d_model, config.num_layers, file) if plugins else {}
    weights = t5_from_modelcenter(t5, config, file) if t5 else None
    ratio = len(converted[f"{PLUGIN}0.mux_layer.bias"]) if converted else None
    with _model_folder(backbone, output, weights) as folder:
        load_backbone(folder)  # a folder that could not be built from must not be written
        params = _stored_params(folder)
        settings = _settings(file, output, ratio, len(tensors), lora_matrices(t5))
        by_ratio = {} if ratio is None else {ratio: {name: tensor.float() for name, tensor in converted.items()}}
        if weights is None:
            _require_its_weights(output, folder, backbone)
        saved = save_checkpoint(output, folder, "variator", settings, by_ratio)
    if config.layer_norm_epsilon != EPSILON_HERE:
        _log.warning(
            "%s/config.json has layer_norm_epsilon %s instead of %s: the official network has the latter, at 1/%d of "
            "this scale of hidden states, which is %s here",
            *(output, EPSILON_HERE, config.layer_norm_epsilon, SCALE, EPSILON_HERE),
        )
    extra = sum(tensor.numel() for tensor in converted.values())
    return Imported(
        method="variator",
        output=str(output),
        ratio=ratio,
        ratios=saved.ratios,
        extra_params=extra,
        extra_params_share=extra / params,
        tensors=len(tensors),
        lora=lora_matrices(t5),
        backbone=str(backbone),
        backbone_from_file=weights is not None,
        layer_norm_epsilon=EPSILON_HERE,
    )


def plugins_from_official(tensors: Mapping[str, Tensor], hidden: int, layers: int, origin: Path) -> dict[str, Tensor]:
    """The plugins of every layer at Hugging Face's scale, under the same names; fp16 becomes fp32.

    k and r are read from layer 0. InputError names the tensor that is missing, left over, or of a wrong shape.
    """
    ratio, width = _sizes(tensors, hidden, layers, origin)
    require_shapes(origin, tensors, plugin_shapes(hidden, layers, ratio, width))
    return {name: _rescaled(name, promoted(tensor), hidden) for name, tensor in tensors.items()}


def plugin_shapes(hidden: int, layers: int, ratio: int, width: int) -> dict[str, Shape]:
    """The exact official layout: 6 tensors per layer."""
    one = {
        "mux_layer.weight": (ratio, ratio * hidden),
        "mux_layer.bias": (ratio,),
        "demux_adapter.w_in.weight": (width, 2 * hidden),
        "demux_adapter.w_in.bias": (width,),
        "demux_adapter.w_out.weight": (hidden, width),
        "demux_adapter.w_out.bias": (hidden,),
    }
    return {f"{PLUGIN}{layer}.{name}": shape for layer in range(layers) for name, shape in one.items()}


def _rescaled(name: str, tensor: Tensor, hidden: int) -> Tensor:
    """The adapter reads the FFN's output, which is 100 times larger here, beside x, which is normed and the same."""
    if name.endswith("demux_adapter.w_in.weight"):
        tensor = tensor.clone()
        tensor[:, :hidden] /= SCALE
        return tensor
    return tensor * SCALE if ".demux_adapter.w_out." in name else tensor


def _sizes(tensors: Mapping[str, Tensor], hidden: int, layers: int, origin: Path) -> tuple[int, int]:
    """k and r as layer 0 has them, once it is known that the file was made for such a backbone."""
    sizes = []
    for part in ("mux_layer.bias", "demux_adapter.w_in.bias", "demux_adapter.w_out.bias"):
        name = f"{PLUGIN}0.{part}"
        if name not in tensors or tensors[name].dim() != 1:
            got = list(tensors[name].shape) if name in tensors else "nothing"
            raise InputError(describe(f"{origin}: {name}", got=got, expected="a vector"))
        sizes.append(len(tensors[name]))
    ratio, width, found_hidden = sizes
    found_layers = len({name.split(".")[1] for name in tensors})
    if (found_layers, found_hidden) != (layers, hidden):
        raise InputError(
            describe(
                f"{origin}: made for another backbone",
                got=f"{found_layers} layers of hidden size {found_hidden}",
                expected=f"{layers} of {hidden}",
            )
        )
    if ratio < 2:
        raise InputError(describe(f"{origin}: tokens merged into one", got=ratio, expected="2 or more"))
    return ratio, width


def _sorted(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of the plugins and those of the backbone; InputError for any other name."""
    for name in tensors:
        if not name.startswith(PLUGIN) and not is_t5(name):
            expected = f"{PLUGIN}… (plugins), t5.… (backbone) or project_…_lora.…"
            raise InputError(describe(f"{file}: unknown tensor", got=name, expected=expected))
    plugins = {name: tensor for name, tensor in tensors.items() if name.startswith(PLUGIN)}
    return plugins, {name: tensor for name, tensor in tensors.items() if not name.startswith(PLUGIN)}


# --- the folder ----------------------------------------------------------------------------------------------------


@contextmanager
def _model_folder(backbone: Path, output: Path, weights: Mapping[str, Tensor] | None) -> Iterator[Path]:
    """A temporary model folder near ``output``: ``backbone`` with the new epsilon and, if given, other weights."""
    with folder_near(output) as folder:
        for path in backbone.iterdir():
            if not _left_out(path, output, weights is not None):
                (folder / path.name).symlink_to(path.resolve())
        document = json.loads((backbone / "config.json").read_text(encoding="utf-8"))
        document["layer_norm_epsilon"] = EPSILON_HERE
        if weights is not None:
            document |= {"architectures": ["T5ForConditionalGeneration"], "dtype": "float32"}
            document.pop("torch_dtype", None)
            write_weights(folder, weights)
        write_config(folder, document)
        yield folder


def _left_out(path: Path, output: Path, other_weights: bool) -> bool:
    """What the new folder does not take over from the backbone's."""
    if path.name == "config.json" or path.suffix in _OTHER_WEIGHTS or path.resolve() == output.resolve():
        return True
    return other_weights and path.name.endswith((".safetensors", ".safetensors.index.json"))


def _require_its_weights(output: Path, folder: Path, backbone: Path) -> None:
    """InputError where ``output`` has other weights, such as those of a task checkpoint, and says the way to add."""
    found = find_checkpoint(output)
    if found is None or found.backbone_sha256 == backbone_sha256(folder):
        return
    hint = f"to add the plugins to its weights: --backbone {output} -o {output}"
    what, expected = f"{output}: already there", f"a new folder, or the weights of {backbone} in it"
    raise InputError(describe(what, got="other weights", expected=expected, hint=hint))


def _stored_params(folder: Path) -> int:
    """Parameters of all stored weights, decoder included; copies of the tied embedding count once."""
    from safetensors import safe_open

    tied = {"lm_head.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"}
    total = 0
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, "pt") as stored:
            names = [name for name in stored.keys() if name not in tied]  # noqa: SIM118, it is no dict
            total += sum(math.prod(stored.get_slice(name).get_shape()) for name in names)
    return total


def _settings(file: Path, output: Path, ratio: int | None, tensors: int, lora: int) -> dict[str, Any]:
    """What ``compexport.json`` says: how the scale was changed, and which file each part came from."""
    previous = find_checkpoint(output)
    imported = dict(previous.settings.get("imported", {})) if previous is not None else {}
    source = {"file": file.name, "sha256": file_sha256(file), "tensors": tensors, "lora": lora}
    files = {**imported.get("files", {}), ("backbone" if ratio is None else str(ratio)): source}
    note = (
        f"official plugins work on a residual stream of 1/{SCALE} of Hugging Face's scale; they were rescaled to the "
        f"latter, where the layer_norm_epsilon {EPSILON_THERE} of the official T5 becomes {EPSILON_HERE}"
    )
    epsilon = {"official": EPSILON_THERE, "config.json": EPSILON_HERE}
    return {"pad": "official", "imported": {"note": note, "layer_norm_epsilon": epsilon, "files": files}}
