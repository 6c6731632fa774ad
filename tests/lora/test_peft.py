"""Changed weights against what diffusers and peft fuse from the same file, where peft is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from cp_convert import bundle as bundles
from cp_convert.ir.tensors import mapped
from cp_convert.lora.add import add
from tests.lora.conftest import Made
from tests.lora.files import diffusers_names, factors, linears
from tests.lora.test_run import WANTED

pytest.importorskip("peft")


def _compared(bundle: Path, model: nn.Module, file: Path, scale: float, count: int) -> None:
    """Every weight that is changed, and no other."""
    add(bundle, file, scale=scale, name="x")
    before = {name: one.detach().clone() for name, one in model.named_parameters()}
    model.load_lora_adapter(mapped(file), adapter_name="x")
    model.set_adapters(["x"], [scale])
    model.fuse_lora()
    model.unload_lora()
    after = dict(model.named_parameters())
    stored = mapped(bundle / bundles.read(bundle)[0].lora[0].file.file)
    assert set(stored) == {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert len(stored) == count
    for name, value in stored.items():
        assert torch.allclose(value, after[name], rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("name", WANTED)
def test_lora(name: str, made: Callable[[str], Made], tmp_path: Path) -> None:
    model = made(name).model()
    given = factors(linears(model, WANTED[name]), 1)
    file = diffusers_names(given, tmp_path / "a.safetensors")
    _compared(made(name).copy(tmp_path), model, file, 0.8, len(given))


def test_dora(made: Callable[[str], Made], tmp_path: Path) -> None:
    model = made("flux").model()
    given = factors(linears(model, WANTED["flux"]), 1)
    tensors: dict[str, Tensor] = {}
    for name, (down, up) in given.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
        tensors[f"transformer.{name}.lora_magnitude_vector"] = up.abs().sum(1) + 0.5
    save_file(tensors, tmp_path / "a.safetensors")
    bundle = made("flux").copy(tmp_path)
    _compared(bundle, model, tmp_path / "a.safetensors", 0.8, len(given))


def test_lokr(made: Callable[[str], Made], tmp_path: Path) -> None:
    model, tensors = made("flux").model(), {}
    layers = linears(model, lambda name: "attn" in name)
    for name, layer in layers.items():
        tensors[f"transformer.{name}.lokr_w1"] = torch.randn(4, 4)
        tensors[f"transformer.{name}.lokr_w2_a"] = torch.randn(layer.out_features // 4, 2)
        tensors[f"transformer.{name}.lokr_w2_b"] = torch.randn(2, layer.in_features // 4)
    save_file(tensors, tmp_path / "a.safetensors")
    bundle = made("flux").copy(tmp_path)
    _compared(bundle, model, tmp_path / "a.safetensors", 1.0, len(layers))
