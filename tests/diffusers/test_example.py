"""What a user copies, with a small FLUX that has all its parts, on ranks as torchrun starts them.

torchrun itself is seen in ``tests/runtime/test_places.py``.
"""

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxPipeline
from PIL import Image

from tests.conftest import EXAMPLES
from tests.diffusers.ranks import run_ranks
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


def copied(rank: int, words: list[str]) -> None:
    """The file, run as a script by one rank."""
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


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
    script = [str(EXAMPLES / "pipeline_flux.py"), str(tmp_path / "out"), *words]
    assert run_ranks(copied, 2, tmp_path / "ranks", script, seconds=300) == [None, None]
    found = np.asarray(Image.open(tmp_path / "found.png")).astype(int)
    assert abs(found - wanted).max() <= 1 < abs(other - wanted).max()
