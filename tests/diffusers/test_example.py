"""What a user copies, run by torchrun with a small FLUX that has all its parts."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from tests.conftest import EXAMPLES, ROOT
from tests.diffusers.tiny_flux import saved
from tests.runtime.bundles import converted

MODEL = """
import torch
from pathlib import Path
from diffusers import FluxTransformer2DModel

here = Path(__file__).parent

def build_model():
    return FluxTransformer2DModel.from_pretrained(here / "flux" / "transformer")

def example_inputs():
    return torch.load(here / "inputs.pt")
"""


def picture(pipeline: FluxPipeline, seed: int) -> np.ndarray[Any, Any]:
    made = pipeline(
        "a red cat", height=64, width=96, max_sequence_length=12, num_inference_steps=2,
        guidance_scale=3.5, generator=torch.Generator().manual_seed(seed),
    ).images[0]  # fmt: skip
    return np.asarray(made).astype(int)


def test_the_example_makes_the_picture_of_the_plain_pipeline(tmp_path: Path) -> None:
    pipeline = FluxPipeline.from_pretrained(saved(tmp_path / "flux"))
    seen: list[dict[str, Any]] = []
    pipeline.transformer.register_forward_pre_hook(
        lambda _, __, given: seen.append(given), with_kwargs=True
    )
    wanted, other = picture(pipeline, 5), picture(pipeline, 6)
    torch.save({n: v for n, v in seen[0].items() if n != "return_dict"}, tmp_path / "inputs.pt")
    (tmp_path / "model.py").write_text(MODEL)
    converted(tmp_path / "model.py", tmp_path / "out", "ulysses", 2)
    options = {
        "--model": tmp_path / "flux", "--prompt": "a red cat", "--out": tmp_path / "found.png",
        "--height": 64, "--width": 96, "--text-tokens": 12, "--steps": 2, "--seed": 5,
        "--executor": "torch",
    }  # fmt: skip
    words = [str(word) for pair in options.items() for word in pair]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    path = os.pathsep.join([str(ROOT), *sys.path])
    done = subprocess.run(
        [*torchrun, "--nproc-per-node=2", EXAMPLES / "pipeline_flux.py", tmp_path / "out", *words],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = np.asarray(Image.open(tmp_path / "found.png")).astype(int)
    assert abs(found - wanted).max() <= 1 < abs(other - wanted).max()
