"""Weights shared by ranks, run by processes: each reads its own share, from wherever it lies."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cp_convert import bundle as bundles
from cp_convert.bundle.manifest import Manifest, of_rank
from cp_convert.errors import UsageError
from cp_convert.job import Job
from cp_convert.lora.add import add
from cp_convert.model.load import load, surroundings
from tests.runtime.bundles import FLUX, QWEN, WAN, converted
from tests.runtime.ranks import outputs_of

FLUX2 = """
import torch
from diffusers import Flux2Transformer2DModel

def build_model():
    torch.manual_seed(0)
    return Flux2Transformer2DModel(in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4))

def example_inputs():
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(1, 48, 16),
        "encoder_hidden_states": torch.randn(1, 12, 32), "timestep": torch.tensor([0.5]),
        "img_ids": torch.arange(48 * 4).reshape(1, 48, 4) % 7.0,
        "txt_ids": torch.arange(12 * 4).reshape(1, 12, 4) % 5.0, "guidance": torch.tensor([3.5])}
"""
MODELS = {"flux": FLUX, "flux2": FLUX2, "wan": WAN, "qwen": QWEN}


@dataclass(frozen=True)
class Case:
    name: str
    strategy: str
    world: int
    weights: str = "embedded"
    cfg: int = 1

    def made(self, folder: Path) -> tuple[Path, Any]:
        """The bundle, with its inputs beside it, and what the dense model returns for them."""
        folder.mkdir()
        model = folder / "model.py"
        model.write_text(MODELS[self.name])
        job = Job(model, "ring", 2 * self.cfg, Path(), cfg=self.cfg, tp=2, precision="fp32")
        with surroundings(job):
            source = load(job)
        state = {name: one.detach().clone() for name, one in source.module.state_dict().items()}
        options: dict[str, Any] = {"weights_mode": self.weights}
        if self.weights == "file":
            save_file(state, folder / "w.safetensors")
            options = {"weights_mode": "external", "weights": folder / "w.safetensors"}
        out = folder / "out"
        converted(model, out, self.strategy, self.world, cfg=self.cfg, tp=2, **options)
        with torch.no_grad():
            (dense,) = source.module(**source.inputs, return_dict=False)
        torch.save(source.inputs, folder / "inputs.pt")
        return out, dense


CASES = [
    Case("flux", "ulysses", 2),
    Case("flux2", "ulysses", 2, "file"),
    Case("wan", "ulysses", 2, "external"),
    Case("qwen", "ulysses", 2),
    Case("flux", "ulysses", 4, "file"),
    Case("flux2", "ring", 4),
    Case("wan", "allgather-kv", 4),
    Case("qwen", "stream-kv", 4, "external"),
    Case("wan", "ulysses", 4, "file", cfg=2),
]


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_ranks_return_what_the_dense_model_does(world: int, tmp_path: Path) -> None:
    cases = [case for case in CASES if case.world == world]
    made, expected = zip(
        *(case.made(tmp_path / str(number)) for number, case in enumerate(cases)), strict=True
    )
    for out, case in zip(made, cases, strict=True):
        manifest, _ = bundles.read(out)
        assert manifest.axes["tp"] == 2
        assert manifest.tensor is not None
        assert manifest.tensor.bytes > 0.7 * manifest.tensor.of_bytes
        assert all(check.problem is None for check in bundles.verify(out))
        if case.weights != "embedded":
            _check_shares(manifest, out, case)
    for rank in outputs_of(made, world, tmp_path):
        for one, dense in zip(rank, expected, strict=True):
            assert one[0].shape == dense.shape
            assert (one[0] - dense).abs().max() <= 1e-5 * dense.abs().max()


def _check_shares(manifest: Manifest, out: Path, case: Case) -> None:
    """Every rank has one part of each weight, and neighbours have different ones."""
    state = {}
    for rank in range(manifest.world):
        own = of_rank(manifest.weights, rank)
        assert len({weight.name for weight in own}) == len(own)
        state[rank] = {weight.name: weight for weight in own}
    shared = {weight.name for weight in manifest.tensor.weights} & state[0].keys()  # type: ignore[union-attr]
    assert shared
    for name in shared:
        first, second = state[0][name], state[1][name]
        assert first.ranks == list(range(0, manifest.world, 2))
        assert (first.file, first.offset) != (second.file, second.offset)
    files = {weight.file for weight in manifest.weights if weight.ranks}
    assert {"weights.tp0.safetensors", "weights.tp1.safetensors"} <= files
    assert (str((out.parent / "w.safetensors").resolve()) in files) == (case.weights == "file")


@pytest.fixture(scope="module")
def external(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out, _ = Case("flux", "ulysses", 2, "file").made(tmp_path_factory.mktemp("one") / "made")
    return out


def _problems(out: Path) -> Sequence[str]:
    return [check.subject for check in bundles.verify(out) if check.problem is not None]


def test_a_damaged_part_is_found(external: Path, tmp_path: Path) -> None:
    shutil.copytree(external, tmp_path / "copy")
    part = tmp_path / "copy" / "weights.tp1.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    assert _problems(tmp_path / "copy") == [part.name]


def test_a_rank_reads_its_own_parts_only(external: Path) -> None:
    """Columns lie in the user's file as they are; rows are written, half of them for each."""
    manifest, _ = bundles.read(external)
    written = [w for w in manifest.weights if w.file.startswith("weights.tp")]
    for weight in written:
        assert weight.ranks == [int(weight.file.split(".tp")[1][0])]
    rows = {w.name for w in written}
    assert "transformer_blocks.0.attn.to_out.0.weight" in rows
    assert "single_transformer_blocks.0.proj_out.weight" in rows
    assert "transformer_blocks.0.attn.to_q.weight" not in rows


def test_a_lora_is_refused_beside_shared_weights(external: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="2 ranks share the bundle's weights"):
        add(external, tmp_path / "lora.safetensors")
