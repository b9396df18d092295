"""Exported variants load in optimum-onnx and write there what PyTorch writes here.

    python -m tests.compat.optimum_loads FOLDER

optimum-onnx needs an older transformers than we do, so FOLDER gets a virtual environment of its own (``FOLDER/venv``,
made at the first run), and the models and bundles that are compared. Exit code 1 where a token differs.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compexport import api
from tests.models import make

ROOT = Path(__file__).resolve().parents[2]
MODELS = ("tiny-t5-four", "tiny-bart-four", "tiny-mbart-four")
RATIO, SEED, TASK = 4, 3, "text2text-generation"
OPTIONS: tuple[dict[str, Any], ...] = (
    {"max_new_tokens": 12, "do_sample": False, "num_beams": 1},
    {"max_new_tokens": 12, "do_sample": False, "num_beams": 3, "length_penalty": 0.7},
)


def environment(folder: Path) -> Path:
    """The Python of a virtual environment in which optimum-onnx is installed; made where there is none."""
    python = folder / "venv" / "bin" / "python"
    if not (folder / "venv" / "complete").exists():
        torch = re.search(r"^torch==\S+", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
        assert torch is not None, "constraints.txt names torch"
        subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
        for packages in ([torch[0]], ["optimum-onnx", "onnxruntime"]):  # torch first, so that it is the CPU's
            subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
        (folder / "venv" / "complete").touch()
    return python


def cases(folder: Path) -> Iterator[tuple[dict[str, Any], list[list[int]]]]:
    """What optimum is asked, and the tokens that PyTorch writes: every model, at ratio 1 and assembled."""
    import torch

    from exporter.backbone import load_seq2seq
    from exporter.methods.assembly import assembly_for_ratio
    from exporter.methods.modular_checkpoint import untrained_modular

    ids = torch.randint(5, 90, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [1] * 4 + [0] * 5, [1] * 7 + [0] * 2])
    for name in MODELS:
        source, bundle = folder / name, folder / f"{name}-bundle"
        if not source.exists():
            make(name, source, TASK)
        api.build(source, [RATIO], bundle, untrained=True, fit=api.Fit(seed=SEED))
        modular = untrained_modular(load_seq2seq(source), SEED)
        for ratio in (1, RATIO):
            target = folder / f"{name}-r{ratio}"
            if not target.exists():
                api.export(bundle, target, f"modular-r{ratio}-fp32")
            model = modular.assemble(assembly_for_ratio(modular.facts, ratio))
            for options in OPTIONS:
                with torch.no_grad():
                    expected = model.generate(input_ids=ids, attention_mask=mask, **options)
                asked = {"folder": str(target), "input_ids": ids.tolist(), "attention_mask": mask.tolist()}
                yield {**asked, "options": options}, expected.tolist()


def main(folder: Path) -> int:
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    python = environment(folder)
    asked, expected = zip(*cases(folder), strict=True)
    (folder / "request.json").write_text(json.dumps(asked))
    script = Path(__file__).with_name("optimum_generates.py")
    done = subprocess.run(
        [python, script, folder / "request.json"], check=True, stdout=subprocess.PIPE, text=True, cwd=folder
    )
    written = json.loads(done.stdout.splitlines()[-1])
    wrong = 0
    for one, wanted, got in zip(asked, expected, written, strict=True):
        same = wanted == got
        wrong += not same
        what = f"{Path(one['folder']).name}, beams {one['options']['num_beams']}"
        print(f"{'the same' if same else 'DIFFERENT'}: {what}" + ("" if same else f": {got}, expected {wanted}"))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
