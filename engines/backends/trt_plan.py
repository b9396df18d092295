"""What a TensorRT plan says of itself, in a file beside it: read and checked before the plan is.

A plan that does not fit may crash the library that opens it, so everything that can be known without the library is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, Literal, TypeVar

from pydantic import Field, ValidationError

from compexport.errors import BundleError, describe
from engines.backends.cuda import Device
from engines.backends.trt_profiles import Profile
from engines.manifest import Record, TensorSpec
from engines.strict_json import parse

FORMAT: Final = 1
# Plans that are hardware-compatible run on Ampere and everything after it.
_OLDEST_COMPATIBLE = 80

Kind = TypeVar("Kind", bound=Record)


class PlanOrder(Record):
    """What is to be built: the graph, the shapes, how. ``options`` are those of ``PlanOptions``, ranges resolved."""

    format: Literal[1] = FORMAT
    product: Literal["trt", "trt-rtx"]
    graph: str = Field(description="key in the manifest's graphs")
    graph_key: str = Field(description="the graph's own key: a hash of everything it was made from")
    profiles: list[Profile] = Field(description="per input the smallest, the usual and the largest shape")
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    options: dict[str, Any]


class Recipe(PlanOrder):
    """A plan that another machine is to build."""

    minimum_version: str
    onnx: str = Field(description="the graph, relative to the bundle")


class PlanRecord(PlanOrder):
    """A plan that is built. ``targets``: compute capabilities that it runs on."""

    version: str = Field(description="of the library that built it")
    platform: str = Field(description="operating system and processor that it was built on")
    targets: list[str]
    plugins: list[str] = Field(description="layers that need a plugin to be registered")
    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    build_seconds: float

    def mismatch(self, *, product: str, version: str, platform: str, graph_key: str) -> tuple[str, str] | None:
        """What this is and what it would have to be for this library to open it; None when it may try."""
        if self.product != product:
            return f"a plan of {self.product}", product
        if self.graph_key != graph_key:
            return "a plan of another graph", f"one of {self.graph} as it is now"
        if self.platform != platform:
            return f"a plan for {self.platform}", platform
        if self.version != version and not self._fits_later(version):
            return f"a plan of version {self.version}", f"{version}, which is installed"
        return None

    def runs_on(self, device: Device) -> bool:
        """Whether it was compiled for this device."""
        newer = bool(self.options.get("hardware_compatible")) and _number(device.capability) >= _OLDEST_COMPATIBLE
        return device.capability in self.targets or newer

    def _fits_later(self, version: str) -> bool:
        """A version-compatible plan runs with later versions of the same major one."""
        ours, theirs = _numbers(self.version), _numbers(version)
        return bool(self.options.get("version_compatible")) and ours[:1] == theirs[:1] and theirs >= ours


def read_record(path: Path) -> PlanRecord:
    """The record beside a plan; BundleError when it is none."""
    return _read(PlanRecord, path)


def read_recipe(path: Path) -> Recipe:
    """A recipe; BundleError when it is none."""
    return _read(Recipe, path)


def _read(kind: type[Kind], path: Path) -> Kind:
    try:
        return kind.model_validate(parse(path.read_bytes()))
    except (OSError, ValueError, ValidationError) as error:
        first = str(error).splitlines()[0]
        raise BundleError(describe(f"{path.name}: not a {kind.__name__}", got=first)) from None


def _number(capability: str) -> int:
    return int(capability.removeprefix("sm"))


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".") if part.isdecimal()]
