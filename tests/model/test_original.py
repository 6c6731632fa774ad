"""Checkpoints in the names of the model's authors, and what a LoRA leaves behind."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.checkpoints.authors import original_wan
from cp_convert.errors import WeightsError
from cp_convert.ir.tensors import bytes_of, tensor_at
from cp_convert.model.adapters import check_no_adapters
from cp_convert.model.checkpoint import locate
from cp_convert.model.meta import unallocated
from cp_convert.model.weights import Filled, load_weights

diffusers = pytest.importorskip("diffusers")


def wan() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2,
    ).eval()  # fmt: skip


def assert_equal(module: nn.Module, truth: nn.Module, filled: Filled) -> None:
    """Every number is right in the module, and where the manifest will say that it is."""
    parameters = dict(module.named_parameters())
    for name, tensor in truth.named_parameters():
        assert torch.equal(parameters[name], tensor), name
    for name, at in filled.located.items():
        assert torch.equal(tensor_at(at, bytes_of(at.file)), parameters[name]), name


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_renamed_tensors_stay_in_the_file(prefix: str, tmp_path: Path) -> None:
    truth = wan()
    named = {prefix + name: tensor for name, tensor in original_wan(truth).items()}
    if prefix:
        named |= {"vae.decoder.weight": torch.ones(2), "text.positions": torch.arange(3)}
    path = tmp_path / "wan.safetensors"
    save_file(named, path)
    with unallocated():
        module = wan()
    filled = load_weights(module, locate(path), path)
    assert_equal(module, truth, filled)
    assert set(filled.located) == {name for name, _ in truth.named_parameters()}
    assert "authors" in filled.told[0] and "0 were computed" in filled.told[0]
    assert [told[:25] for told in filled.told[1:]] == (
        ["2 tensors of other models"] if prefix else []
    )


def test_one_missing_tensor_is_named_in_the_models_words(tmp_path: Path) -> None:
    named = original_wan(wan())
    del named["blocks.1.self_attn.q.weight"]
    path = tmp_path / "wan.safetensors"
    save_file(named, path)
    with pytest.raises(WeightsError, match=r"1 missing: blocks\.1\.attn1\.to_q\.weight"):
        load_weights(wan(), locate(path), path)


def test_float8_in_the_authors_names_needs_a_word(tmp_path: Path) -> None:
    truth = wan()
    named = {n: t.to(torch.float8_e4m3fn) for n, t in original_wan(truth).items()}
    path = tmp_path / "wan.safetensors"
    save_file(named, path)
    with pytest.raises(WeightsError, match="quantized: stored as F8_E4M3, without scales"):
        load_weights(wan(), locate(path), path)
    module = wan()
    filled = load_weights(module, locate(path), path, allowed=("float8",))
    for name, parameter in module.named_parameters():
        rounded = truth.get_parameter(name).to(torch.float8_e4m3fn).float()
        assert torch.equal(parameter, rounded)
    assert [(c.stored, c.computed, c.tensors) for c in filled.casts] == [
        ("float8_e4m3fn", "float32", len(named))
    ]
    save_file({**named, "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(WeightsError, match="its scales are scaled_fp8"):
        load_weights(wan(), locate(path), path, allowed=("float8",))


def test_pieces_stay_and_swapped_halves_are_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mapping that cuts, swaps and renames as those of FLUX and SD3 do."""
    from diffusers.loaders import single_file_model

    def mapping(checkpoint: dict[str, Tensor], **_: object) -> dict[str, Tensor]:
        q, k = torch.chunk(checkpoint.pop("qk"), 2, dim=0)
        shift, scale = checkpoint.pop("mod").chunk(2, dim=0)
        return {
            "q.weight": torch.cat([q]),
            "k.weight": torch.cat([k]),
            "mod.weight": torch.cat([scale, shift]),
            "turned.weight": checkpoint.pop("turned").T,
        }

    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["WanTransformer3DModel"]
    monkeypatch.setitem(known, "checkpoint_mapping_fn", mapping)

    class Own(diffusers.WanTransformer3DModel):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            nn.Module.__init__(self)
            self.q, self.k = nn.Linear(4, 3, bias=False), nn.Linear(4, 3, bias=False)
            self.mod, self.turned = nn.Linear(2, 6, bias=False), nn.Linear(5, 2, bias=False)

    truth = Own()
    q, k, mod, turned = (p.detach().clone() for p in truth.parameters())
    path = tmp_path / "x.safetensors"
    swapped = torch.cat(mod.chunk(2)[::-1])
    save_file({"qk": torch.cat([q, k]), "mod": swapped, "turned": turned.T.contiguous()}, path)
    with unallocated():
        module = Own()
    filled = load_weights(module, locate(path), path)
    assert_equal(module, truth, filled)
    assert set(filled.located) == {"q.weight", "k.weight"}


def test_names_that_diffusers_cannot_map_are_a_message(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"something.else": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match="are not those of the model"):
        load_weights(wan(), locate(path), path)
    flux = diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    with pytest.raises(WeightsError, match="diffusers cannot map these names"):
        load_weights(flux, locate(path), path)


@pytest.mark.parametrize("how", ["attached", "fused", "gone"])
def test_a_lora_is_not_overwritten(how: str) -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    if how == "gone":  # as diffusers leaves a model after fuse_lora() and unload_lora()
        module._hf_peft_config_loaded = None  # type: ignore[assignment]
    else:
        layer = nn.Module()
        layer.base_layer, layer.merged = nn.Linear(2, 2), how == "fused"
        layer.lora_A = nn.ModuleDict({"default": nn.Linear(2, 1)})
        module[0] = layer
    with pytest.raises(WeightsError, match="LoRA") as caught:
        check_no_adapters(module)
    assert ("attached" if how == "attached" else "fused") in caught.value.message
    assert "leave --weights out" in (caught.value.hint or "")
    check_no_adapters(nn.Sequential(nn.Linear(2, 2)))
