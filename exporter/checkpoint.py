"""Method checkpoints: a Hugging Face folder plus ``compexport.json`` and safetensors files.

There is one such file per ratio, or one that serves all ratios, as the method has it.

Reading the description needs neither torch nor transformers; only the tensors themselves do.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from compexport.errors import InputError, describe
from exporter.identity import backbone_sha256, file_sha256, has_tokenizer
from exporter.official import require_plain_model

if TYPE_CHECKING:
    from torch import Tensor

    Tensors = Mapping[str, Tensor]

FORMAT = 1
DESCRIPTION = "compexport.json"
_TENSORS = re.compile(r"([a-z]+-r[0-9.]+|modular)\.safetensors")  # the files beside it, of whatever method


class _Description(BaseModel):
    """What ``compexport.json`` holds."""

    format: int
    method: str
    backbone_sha256: str
    files: dict[str, str] = {}
    file: str | None = None
    settings: dict[str, Any] = {}


def plain_ratio(ratio: float | str) -> float:
    """A ratio as names and files write it: a whole one is an int, so that it has no ".0"; ValueError below 1."""
    number = float(ratio)
    if not (math.isfinite(number) and number >= 1):
        raise ValueError(f"{ratio} is no ratio")
    return int(number) if number == int(number) else number


@dataclass(frozen=True)
class MethodCheckpoint:
    """The description found in a folder. ``settings``: what the method says of its tensors, and the training record.

    ``files`` by ratio, each a :func:`plain_ratio`; ``file`` serves all ratios. Where a ratio is asked for, None means
    the latter.
    """

    folder: Path
    method: str
    backbone_sha256: str
    files: dict[float, str]
    settings: dict[str, Any]
    file: str | None = None

    @property
    def ratios(self) -> list[float]:
        return sorted(self.files)

    @property
    def pad(self) -> str:
        return str(self.settings.get("pad", "masked"))

    def sha256(self, ratio: float | None = None) -> str:
        """Content hash of the tensors of one ratio."""
        return file_sha256(self._path(ratio))

    def names(self, ratio: float | None = None) -> set[str]:
        """The names of the tensors of one ratio, without reading them; InputError as ``load``."""
        from safetensors import SafetensorError, safe_open

        path = self._path(ratio)
        try:
            with safe_open(path, "numpy") as file:
                return set(file.keys())
        except (OSError, SafetensorError) as error:
            raise InputError(describe(f"{path}: unreadable", got=error, expected="a safetensors file")) from error

    def load(self, ratio: float | None = None) -> dict[str, Tensor]:
        """The tensors of one ratio; InputError names the file when it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(ratio)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(describe(f"{path}: unreadable", got=error, expected="a safetensors file")) from error

    def _path(self, ratio: float | None) -> Path:
        name = self.file if ratio is None else self.files[ratio]
        if name is None:
            got = f"files for ratios {self.ratios}"
            raise InputError(describe(f"{self.folder / DESCRIPTION}: file", got=got, expected="one for all ratios"))
        path = self.folder / name
        what = "them" if ratio is None else "the ratio"
        if not path.is_file():
            raise InputError(
                describe(f"{path}: missing", hint=f"fit {what} again with `compexport train {self.method}`")
            )
        return path


def find_checkpoint(folder: str | Path, method: str | None = None) -> MethodCheckpoint | None:
    """The method checkpoint in ``folder``, None if there is only a backbone.

    InputError if ``compexport.json`` is unreadable, of a newer format, or belongs to other weights, or to another
    method than the one named, and for an official checkpoint that is no plain model.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        require_plain_model(folder)
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format"]
        if version == FORMAT:
            found = _Description.model_validate(raw)
            files = {plain_ratio(ratio): name for ratio, name in found.files.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise InputError(describe(f"{path}: unreadable", got=got)) from error
    if version != FORMAT:
        raise InputError(describe(f"{path}: unknown format", got=version, expected=FORMAT, hint="upgrade compexport"))
    for name in (*found.files.values(), *([] if found.file is None else [found.file])):
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(describe(f"{path}: unsafe file name", got=repr(name), expected="a .safetensors beside it"))
    if found.backbone_sha256 != backbone_sha256(folder):
        if not has_tokenizer(folder):  # a part of what the tensors were trained for
            hint = "put the files back that the model was trained with"
            raise InputError(describe(f"{folder}: no usable tokenizer", expected="tokenizer.json", hint=hint))
        raise InputError(
            describe(f"{folder}: the {found.method} tensors are of other weights", hint="train them for this backbone")
        )
    if method is not None and method != found.method:
        raise InputError(describe(f"{folder}: a checkpoint of another method", got=found.method, expected=method))
    return MethodCheckpoint(folder, found.method, found.backbone_sha256, files, found.settings, found.file)


def save_checkpoint(
    folder: str | Path,
    backbone_folder: str | Path,
    method: str,
    settings: Mapping[str, Any],
    tensors: Mapping[float, Tensors] | Mapping[int, Tensors] | None = None,
    *,
    for_all: Tensors | None = None,
) -> MethodCheckpoint:
    """Write the backbone, and the method's tensors of each ratio, to ``folder``; the backbone's files stay untouched.

    ``for_all`` are tensors that serve all ratios, in one file.

    ``folder`` may be the backbone's own folder: then only the new files are added. Ratios that are there already are
    kept unless given anew, and so are their rows in settings that are tables by ratio. A new folder appears whole or
    not at all; an existing folder that holds something else, or another method, raises InputError.
    """
    folder, backbone_folder = Path(folder), Path(backbone_folder)
    by_ratio = {plain_ratio(ratio): found for ratio, found in (tensors or {}).items()}
    if not folder.exists() or not any(folder.iterdir()):
        _create(folder, backbone_folder, method, settings, by_ratio, for_all)
    else:
        _require_same_backbone(folder, backbone_folder)
        _write_tensors(folder, method, settings, by_ratio, for_all)
    found = find_checkpoint(folder)
    assert found is not None
    return found


def _require_same_backbone(folder: Path, backbone_folder: Path) -> None:
    same = folder.resolve() == backbone_folder.resolve()
    if not same and not (
        (folder / DESCRIPTION).is_file() and backbone_sha256(folder) == backbone_sha256(backbone_folder)
    ):
        raise InputError(
            describe(f"{folder}: already there", expected="a new folder, or a checkpoint of the same backbone")
        )


def _create(
    folder: Path,
    backbone_folder: Path,
    method: str,
    settings: Mapping[str, Any],
    tensors: Mapping[float, Tensors],
    for_all: Tensors | None,
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        copy_model(backbone_folder, staging)
        _write_tensors(staging, method, settings, tensors, for_all)
        staging.chmod(0o755)
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def copy_model(source: Path, target: Path) -> None:
    """The files of a model's folder and the modules of sentence-transformers; whoever works there has more in it."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _no_part_of_a_model(path.name):
            shutil.copy2(path, target / path.name)
    for name in _module_folders(source):
        shutil.copytree(source / name, target / name, dirs_exist_ok=True)


def _no_part_of_a_model(name: str) -> bool:
    ours = name == DESCRIPTION or _TENSORS.fullmatch(name) is not None
    return ours or name.startswith(".") or name.endswith(".tmp")


def _module_folders(source: Path) -> list[str]:
    """Sub-folders that belong to the model: those of ``modules.json``, and the poolings that are in its identity."""
    named: set[str] = set()
    try:
        named = {str(entry["path"]) for entry in json.loads((source / "modules.json").read_text(encoding="utf-8"))}
    except FileNotFoundError:
        pass
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise InputError(describe(f"{source / 'modules.json'}: unreadable", got=error, expected="modules")) from error
    inside = {path.name for path in source.iterdir() if path.is_dir()}
    return sorted((named & inside) | {path.parent.name for path in source.glob("*_Pooling/config.json")})


def _write_tensors(
    folder: Path,
    method: str,
    settings: Mapping[str, Any],
    tensors: Mapping[float, Tensors],
    for_all: Tensors | None,
) -> None:
    previous = find_checkpoint(folder, method)
    files = dict(previous.files) if previous else {}
    kept = [ratio for ratio in files if ratio not in tensors]
    pad = settings.get("pad")
    if previous and kept and pad not in (None, previous.pad):
        hint = "use another folder, or fit all of them again"
        raise InputError(describe(f"{folder}: ratios {kept} have pad {previous.pad}", got=f"pad {pad}", hint=hint))
    for ratio, found in tensors.items():
        name = f"{method}-r{ratio}.safetensors"
        _write_file(folder / name, found)
        files[ratio] = name
    file = previous.file if previous else None
    if for_all is not None:
        file = f"{method}.safetensors"
        _write_file(folder / file, for_all)
    document = {
        "format": FORMAT,
        "method": method,
        "backbone_sha256": backbone_sha256(folder),
        **({"files": {str(ratio): files[ratio] for ratio in sorted(files)}} if files else {}),
        **({"file": file} if file else {}),
        "settings": _merged(previous.settings if previous else {}, settings, kept),
    }
    with _replacing(folder / DESCRIPTION) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _write_file(path: Path, tensors: Tensors) -> None:
    from safetensors.torch import save_file

    with _replacing(path) as partial:
        save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial)


def _merged(old: Mapping[str, Any], new: Mapping[str, Any], kept: Iterable[float]) -> dict[str, Any]:
    """The new settings over the old ones; of old tables by ratio, the rows of those ratios that are ``kept``."""
    merged, ratios = {**old, **new}, {str(ratio) for ratio in kept}
    for name, before in old.items():
        if not _is_by_ratio(before):
            continue
        rows = {ratio: row for ratio, row in before.items() if ratio in ratios}
        if name not in new and not rows:
            del merged[name]
        elif name not in new:
            merged[name] = rows
        elif _is_by_ratio(new[name]):
            merged[name] = {**rows, **new[name]}
    return merged


def _is_by_ratio(table: object) -> bool:
    if not isinstance(table, Mapping) or not table:
        return False
    try:
        return all(str(plain_ratio(ratio)) == ratio for ratio in table)
    except (TypeError, ValueError):
        return False


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside ``target`` to write, which takes its place afterwards or, after an error, vanishes."""
    partial = target.with_name(f".{target.name}.tmp")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
