"""Method checkpoints: a Hugging Face folder plus ``compexport.json`` and one safetensors file per ratio.

Reading the description needs neither torch nor transformers; only the tensors themselves do.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from compexport.errors import InputError, describe
from exporter.identity import backbone_sha256, file_sha256

if TYPE_CHECKING:
    from torch import Tensor

FORMAT = 1
DESCRIPTION = "compexport.json"


class _Description(BaseModel):
    """What ``compexport.json`` holds."""

    format: int
    method: str
    backbone_sha256: str
    files: dict[int, str]
    settings: dict[str, Any] = {}


@dataclass(frozen=True)
class MethodCheckpoint:
    """The description found in a folder. ``settings``: pad mode, adapter widths, training record."""

    folder: Path
    method: str
    backbone_sha256: str
    files: dict[int, str]
    settings: dict[str, Any]

    @property
    def ratios(self) -> list[int]:
        return sorted(self.files)

    @property
    def pad(self) -> str:
        return str(self.settings.get("pad", "masked"))

    def sha256(self, ratio: int) -> str:
        """Content hash of the tensors of one ratio."""
        return file_sha256(self._path(ratio))

    def load(self, ratio: int) -> dict[str, Tensor]:
        """The tensors of one ratio; InputError names the file when it is missing or damaged."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = self._path(ratio)
        try:
            return load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(describe(f"{path}: unreadable", got=error, expected="a safetensors file")) from error

    def _path(self, ratio: int) -> Path:
        path = self.folder / self.files[ratio]
        if not path.is_file():
            raise InputError(
                describe(f"{path}: missing", hint=f"fit the ratio again with `compexport train {self.method}`")
            )
        return path


def find_checkpoint(folder: str | Path) -> MethodCheckpoint | None:
    """The method checkpoint in ``folder``, None if there is only a backbone.

    InputError if ``compexport.json`` is unreadable, of a newer format, or belongs to other weights.
    """
    folder = Path(folder)
    path = folder / DESCRIPTION
    if not path.is_file():
        return None
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        version = raw["format"]
        if version == FORMAT:
            found = _Description.model_validate(raw)
    except (OSError, ValueError, KeyError, TypeError) as error:
        got = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise InputError(describe(f"{path}: unreadable", got=got)) from error
    if version != FORMAT:
        raise InputError(describe(f"{path}: unknown format", got=version, expected=FORMAT, hint="upgrade compexport"))
    for name in found.files.values():
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise InputError(describe(f"{path}: unsafe file name", got=repr(name), expected="a .safetensors beside it"))
    if found.backbone_sha256 != backbone_sha256(folder):
        raise InputError(
            describe(f"{folder}: the plugins were fitted for other weights", hint="fit them again for this backbone")
        )
    return MethodCheckpoint(folder, found.method, found.backbone_sha256, found.files, found.settings)


def save_checkpoint(
    folder: str | Path,
    backbone_folder: str | Path,
    method: str,
    settings: Mapping[str, Any],
    plugins: Mapping[int, Mapping[str, Tensor]],
) -> MethodCheckpoint:
    """Write backbone and plugins to ``folder``; the backbone's own files are copied untouched.

    ``folder`` may be the backbone's own folder: then only the new files are added. Ratios that are there already are
    kept unless given anew. A new folder appears whole or not at all; an existing folder that holds something else
    raises InputError.
    """
    folder, backbone_folder = Path(folder), Path(backbone_folder)
    if not folder.exists() or not any(folder.iterdir()):
        _create(folder, backbone_folder, method, settings, plugins)
    else:
        _require_same_backbone(folder, backbone_folder)
        _write_plugins(folder, method, settings, plugins)
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
    plugins: Mapping[int, Mapping[str, Tensor]],
) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        _copy_model(backbone_folder, staging)
        _write_plugins(staging, method, settings, plugins)
        staging.chmod(0o755)
        os.replace(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _copy_model(source: Path, target: Path) -> None:
    """The files of a model's folder and the modules of sentence-transformers; whoever works there has more in it."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _no_part_of_a_model(path.name):
            shutil.copy2(path, target / path.name)
    for name in _module_folders(source):
        shutil.copytree(source / name, target / name, dirs_exist_ok=True)


def _no_part_of_a_model(name: str) -> bool:
    return name == DESCRIPTION or name.startswith((".", "variator-r")) or name.endswith(".tmp")


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


def _write_plugins(
    folder: Path, method: str, settings: Mapping[str, Any], plugins: Mapping[int, Mapping[str, Tensor]]
) -> None:
    from safetensors.torch import save_file

    previous = find_checkpoint(folder)
    files = dict(previous.files) if previous else {}
    kept = [ratio for ratio in files if ratio not in plugins]
    pad = settings.get("pad")
    if previous and kept and pad not in (None, previous.pad):
        hint = "use another folder, or fit all of them again"
        raise InputError(describe(f"{folder}: ratios {kept} have pad {previous.pad}", got=f"pad {pad}", hint=hint))
    for ratio, tensors in plugins.items():
        name = f"{method}-r{ratio}.safetensors"
        with _replacing(folder / name) as partial:
            save_file({key: tensor.detach().contiguous() for key, tensor in tensors.items()}, partial)
        files[ratio] = name
    document = {
        "format": FORMAT,
        "method": method,
        "backbone_sha256": backbone_sha256(folder),
        "files": {str(ratio): files[ratio] for ratio in sorted(files)},
        "settings": {**(previous.settings if previous else {}), **settings},
    }
    with _replacing(folder / DESCRIPTION) as partial:
        partial.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside ``target`` to write, which takes its place afterwards or, after an error, vanishes."""
    partial = target.with_name(f".{target.name}.tmp")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
