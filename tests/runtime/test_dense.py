"""What a run is compared with: the model, built again as it was converted."""

import runpy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cp_convert.errors import RunFailed
from cp_convert.runtime.dense import compare
from tests.conftest import MODEL_FILE
from tests.model.by_tools.make import HERE
from tests.model.test_modelopt import MODEL
from tests.runtime.bundles import converted


def test_codes_are_taken_as_their_numbers(tmp_path: Path) -> None:
    """What had to be asked for besides (here ``--quantize fp8``) is not asked for again."""
    model, outputs = tmp_path / "m.py", tmp_path / "o.safetensors"
    model.write_text(MODEL)
    file, out = HERE / "torchao-tensor.safetensors", tmp_path / "out"
    manifest = converted(
        model, out, "ulysses", 2, precision="bf16", weights=file, quantize="fp8", proof="program"
    )
    (output,) = (io for io in manifest.io if io.mode == "output")
    save_file({output.name: torch.zeros(output.shape).bfloat16()}, outputs)
    asked = {"bundle": str(out), "outputs": str(outputs)}
    with pytest.raises(RunFailed, match="something else than the dense model"):
        compare(manifest, asked, "torch")
    large = tmp_path / "large.safetensors"
    save_file({"x": torch.full((1, 32, 16), 50.0).bfloat16()}, large)
    told = compare(manifest, asked | {"inputs": str(large)}, "torch")
    assert told["error"] is None
    assert (
        "larger than those that the scales were made for: what goes into blocks."
        in (told["reason"])
    )


def test_weights_that_were_merely_cast_are_taken_again(tmp_path: Path) -> None:
    """The bundle was made with ``--allow-cast float8``, so that nobody has to be asked again."""
    model, weights = tmp_path / "m.py", tmp_path / "w.safetensors"
    inputs, outputs = tmp_path / "i.safetensors", tmp_path / "o.safetensors"
    model.write_text(MODEL_FILE)
    space = runpy.run_path(str(model))
    module = space["build_model"]().eval()
    cast = {name: t.to(torch.float8_e4m3fn) for name, t in module.state_dict().items()}
    save_file(cast, weights)
    module.load_state_dict({name: t.float() for name, t in cast.items()})
    manifest = converted(
        model, tmp_path / "out", "ulysses", 2, weights=weights, allow_cast=("float8",)
    )
    with torch.no_grad():
        found = module(**(given := space["example_inputs"]()))
    (name,) = (io.name for io in manifest.io if io.mode == "output")
    save_file({name: found}, outputs)
    save_file(given, inputs)
    request = {"bundle": str(tmp_path / "out"), "inputs": str(inputs), "outputs": str(outputs)}
    told = compare(manifest, request, "torch")
    assert told["reason"] is None and told["error"] <= 1e-5
