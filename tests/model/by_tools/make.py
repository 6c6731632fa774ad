"""The files beside this one, by torchao 0.18.0 and comfy-kitchen 0.2.40, which must be installed.

    python -m tests.model.by_tools.make

They are of the model of :mod:`tests.model.test_modelopt` in bfloat16. ``numbers.safetensors`` has
what codes of those that are taken stand for, as the tools say it, of the layers of one block. The
test-suite needs neither tool.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.checkpoints.by_tools import (
    KITCHEN,
    TORCHAO,
    by_kitchen,
    by_torchao,
    numbers_of_kitchen,
    quantized,
)
from tests.model.test_comfy import named as plain
from tests.model.test_modelopt import LAYERS, module

HERE = Path(__file__).parent
TAKEN = ("row", "tensor", "weight", "float8_e4m3fn", "nvfp4")


def main() -> None:
    """Write all of them."""
    numbers: dict[str, Tensor] = {}
    for kind in TORCHAO:
        by_torchao(module(), LAYERS, kind, HERE / f"torchao-{kind}.safetensors")
        coded = quantized(module(), LAYERS, kind)
        for layer in LAYERS[:2] if kind in TAKEN else ():
            weight = coded.get_submodule(layer).weight
            numbers[f"torchao-{kind} {layer}"] = weight.dequantize()  # type: ignore[operator]
    named = plain()
    for kind in KITCHEN:
        tensors, _ = by_kitchen(named, LAYERS, kind)
        save_file(tensors, HERE / f"kitchen-{kind}.safetensors")
        for layer in LAYERS[:2] if kind in TAKEN else ():
            weight = named[f"{layer}.weight"]
            numbers[f"kitchen-{kind} {layer}"] = numbers_of_kitchen(weight, kind)
    save_file({n: t.to(torch.bfloat16).contiguous() for n, t in numbers.items()},
              HERE / "numbers.safetensors")  # fmt: skip


if __name__ == "__main__":
    main()
