"""Codes with a scale for each row: what is read, where it stays, and what is refused by name."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.checkpoints.authors import FLUX_LAYERS, original_flux, smaller_flux
from benchmarks.checkpoints.comfy import write
from benchmarks.checkpoints.rowwise import BY_TOKEN, FP8, fp8r, torchao
from cp_convert.errors import WeightsError
from cp_convert.ir.tensors import bytes_of, tensor_at
from tests.model.test_comfy import built, loaded, made_of_flux, named
from tests.model.test_modelopt import LAYERS
from tests.runtime.bundles import FLUX

OUT = "blocks.0.out"


def test_rows_follow_the_split_of_flux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the halves of the last modulation change places with their scales."""
    pytest.importorskip("diffusers")
    smaller_flux(monkeypatch, 64)
    last = "final_layer.adaLN_modulation.1"
    theirs = original_flux(built(FLUX))
    tensors = fp8r(theirs, [*FLUX_LAYERS, last])
    source = loaded(tmp_path, write(tmp_path / "flux.safetensors", tensors, {}), FLUX)
    held = dict(source.module.named_parameters())
    own = made_of_flux() | {"norm_out.linear": last}
    assert set(source.codes) == {f"{layer}.weight" for layer in own}
    for name, one in source.codes.items():
        assert isinstance(one.weight_scale, Tensor)
        assert one.by_token
        stored = tensors[f"{own[name.removesuffix('.weight')]}.weight_scale"]
        assert torch.isin(one.weight_scale, stored).all()
        numbers = (one.codes.float() * one.weight_scale[:, None]).bfloat16()
        assert torch.equal(held[name], numbers)
        if (at := source.located.get(name)) is not None:
            raw = tensor_at(at, bytes_of(at.file)).view(torch.uint8)
            assert torch.equal(raw, one.codes.view(torch.uint8))
    assert set(source.codes) - set(source.located) == {"norm_out.linear.weight"}
    shift, scale = tensors[f"{last}.weight_scale"].chunk(2)
    swapped = source.codes["norm_out.linear.weight"].weight_scale
    assert torch.equal(swapped, torch.cat([scale, shift]))  # type: ignore[arg-type]
    value = source.codes["transformer_blocks.0.attn.to_v.weight"].weight_scale
    whole = tensors["double_blocks.0.img_attn.qkv.weight_scale"]
    assert torch.equal(value, whole[128:])  # type: ignore[arg-type]


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("given", [BY_TOKEN, None])
def test_torchaos_tensors(given: object, old: bool, tmp_path: Path) -> None:
    tensors, metadata = torchao(named(), LAYERS, given, old=old)
    source = loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, metadata))
    held = dict(source.module.named_parameters())
    assert set(source.codes) == {f"{layer}.weight" for layer in LAYERS}
    for layer in LAYERS:
        one, pieces = source.codes[f"{layer}.weight"], (f"{layer}._weight_qdata", "")
        pieces = (f"{layer}._weight_qdata", f"{layer}._weight_scale")
        if old:
            pieces = (f"{layer}.weight:qdata", f"{layer}.weight:scale")
        codes, scale = (tensors[piece] for piece in pieces)
        assert one.by_token == (given is not None)
        assert torch.equal(one.weight_scale, scale.flatten())  # type: ignore[arg-type]
        assert torch.equal(held[f"{layer}.weight"], (codes.float() * scale).bfloat16())
        assert source.located[f"{layer}.weight"].dtype == FP8
    alone = "4 weights in FP8 without a scale for the layer's input"
    assert any(alone in told for told in source.told) == (given is None)


def test_torchaos_scale_of_a_whole_weight(tmp_path: Path) -> None:
    tensors, metadata = torchao(named(), LAYERS, None)
    for layer in LAYERS:
        told = json.loads(metadata[f"{layer}.weight"])
        told["_data"]["block_size"][0] = len(tensors[f"{layer}._weight_qdata"])
        metadata[f"{layer}.weight"] = json.dumps(told)
        tensors[f"{layer}._weight_scale"] = torch.full((1, 1), 0.01)
    source = loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, metadata))
    assert {(round(one.step, 6), one.rows, one.is_multiplied) for one in source.codes.values()} == {
        (0.01, None, False)
    }


Damage = Callable[[dict[str, Tensor]], object]


def rows(value: float) -> Tensor:
    found = torch.ones(64)
    found[5] = value
    return found


def with_(name: str, value: Tensor) -> Damage:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda t: t.pop(f"{OUT}.weight_scale"), f"{OUT}.weight_scale is missing"),
        (with_(f"{OUT}.weight_scale", rows(-2)), "weight_scale .* is -2.0"),
        (with_(f"{OUT}.weight_scale", rows(0)), "weight_scale .* is 0.0"),
        (with_(f"{OUT}.weight_scale", rows(1e-40)), "weight_scale .* between 1.2e-35"),
        (with_(f"{OUT}.weight_scale", rows(torch.nan)), "weight_scale .* is nan"),
        (with_(f"{OUT}.weight_scale", rows(torch.inf)), "weight_scale .* is inf"),
        (with_(f"{OUT}.weight_scale", torch.ones(63)), r"F32\[63\]; there are 64 rows"),
        (with_(f"{OUT}.weight_scale", torch.ones(64, 2)), r"F32\[64, 2\]; there are 64 rows"),
        (with_(f"{OUT}.weight_scale", torch.ones(())), r"F32\[\]; there are 64 rows"),
        (with_(f"{OUT}.weight_scale", torch.ones(64).char()), r"I8\[64\]"),
        (with_("leave.weight_scale", torch.ones(16)), "leave.weight is stored as BF16"),
        (with_("blocks.7.out.weight_scale", torch.ones(64)), "blocks.7.out.weight is not there"),
        (with_(f"{OUT}.input_scale", torch.ones(())), r"F32\[192\]|F32\[64\]|missing"),
        (with_(f"{OUT}.weight", torch.full((64, 64), torch.nan).to(FP8)), "out.weight .* NaN"),
    ],
)
def test_what_is_no_such_file_is_refused_by_name(damage: Damage, told: str, tmp_path: Path) -> None:
    tensors = fp8r(named(), LAYERS)
    damage(tensors)
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, {}))
    assert caught.value.exit_code == 2


def changed(*path: str, value: object) -> Callable[[dict[str, Any]], None]:
    def change(told: dict[str, Any]) -> None:
        for step in path[:-1]:
            told = told[step]
        told[path[-1]] = value

    return change


KWARGS = ("_data", "act_quant_kwargs", "_data")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (changed("_type", value="NVFP4Tensor"), "out.weight .* said to be NVFP4Tensor"),
        (changed("_data", "block_size", value=[1, 32]), r"FP8 in blocks of \[1, 32\]"),
        (changed("_data", "block_size", value=[64, 64]), "its input by tokens"),
        (changed(*KWARGS, "granularity", "_type", value="PerGroup"), "quantized PerGroup"),
        (changed(*KWARGS, "granularity", "_data", value={"dim": 0}), "input quantized PerRow"),
        (changed(*KWARGS, "hp_value_ub", value=5.0), r"within \[None, 5.0\]"),
        (changed(*KWARGS, "float8_dtype", "_data", value="float8_e5m2"), "float8_e5m2"),
        (changed("_data", value=[]), "said to be Float8Tensor"),
        (changed(*KWARGS, "granularity", value=7), "input quantized None"),
        (changed(*KWARGS, "float8_dtype", value=3), "input quantized PerRow, None"),
        (changed("_data", "act_quant_kwargs", value=[1]), "input quantized None"),
        (changed("_tensor_data_names", value=["qdata", "scale", "zero_point"]), "zero_point"),
        (changed("_tensor_data_names", value="qdata"), "FP8 of qdata"),
    ],
)
def test_what_torchao_says_otherwise_is_refused(
    change: Callable[[dict[str, Any]], None], told: str, tmp_path: Path
) -> None:
    tensors, metadata = torchao(named(), LAYERS, copy.deepcopy(BY_TOKEN))
    described = json.loads(metadata[f"{OUT}.weight"])
    change(described)
    metadata[f"{OUT}.weight"] = json.dumps(described)
    with pytest.raises(WeightsError, match=told):
        loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, metadata))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda t, m: t.pop(f"{OUT}._weight_scale"), "out._weight_scale is missing"),
        (lambda t, m: t.pop(f"{OUT}._weight_qdata"), "out._weight_qdata is missing"),
        (lambda t, m: t.update({f"{OUT}._weight_qdata": torch.ones(64, 64)}), r"F32\[64, 64\]"),
        (lambda t, m: t.update({f"{OUT}._weight_scale": torch.ones(64, 2)}), "there are 64 rows"),
        (lambda t, m: t.update({"leave._weight_scale": torch.ones(64)}), "1 unexpected"),
        (lambda t, m: m.pop(f"{OUT}.weight"), "out.weight .* not described"),
        (lambda t, m: m.update({f"{OUT}.weight": "{"}), "no JSON that can be read"),
        (lambda t, m: m.update({"tensor_names": "{"}), "no JSON that can be read"),
        (lambda t, m: m.update({"tensor_names": "3"}), "no list of names"),
        (lambda t, m: m.update({"tensor_names": f'["{OUT}.weight", "{OUT}.weight"]'}), "two tens"),
        (lambda t, m: t.update({f"{OUT}.weight": torch.ones(64, 64)}), "stored as numbers too"),
        (lambda t, m: t.update({f"{OUT}.weight:scale": torch.ones(64, 1)}), "1 unexpected"),
    ],
)
def test_torchaos_pieces_that_are_missing_or_odd(
    damage: Callable[[dict[str, Tensor], dict[str, str]], object], told: str, tmp_path: Path
) -> None:
    tensors, metadata = torchao(named(), LAYERS)
    damage(tensors, metadata)
    with pytest.raises(WeightsError, match=told):
        loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, metadata))


def shards(folder: Path, *, own: bool) -> Path:
    """Two files; of all tensors each tells, or of its own."""
    tensors, told = torchao(named(), LAYERS)
    first = {name for name in told if name.startswith("blocks.0.")}
    folder.mkdir()
    index = {}
    for number, is_own in enumerate((True, False)):
        file = f"model-{number}.safetensors"
        held = {n: t for n, t in tensors.items() if n.startswith("blocks.0.") == is_own}
        describes = {n for n in told if (n in first) == is_own and n != "tensor_names"}
        metadata = {n: told[n] for n in describes} if own else dict(told)
        metadata["tensor_names"] = json.dumps([n for n in metadata if n != "tensor_names"])
        write(folder / file, held, metadata)
        index |= dict.fromkeys(held, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


@pytest.mark.parametrize("own", [False, True])
def test_torchaos_tensors_in_several_files(own: bool, tmp_path: Path) -> None:
    """diffusers has each of them tell of all tensors."""
    source = loaded(tmp_path, shards(tmp_path / "sharded", own=own))
    assert set(source.codes) == {f"{layer}.weight" for layer in LAYERS}


def test_files_that_contradict_each_other(tmp_path: Path) -> None:
    folder = shards(tmp_path / "sharded", own=False)
    tensors, told = torchao(named(), LAYERS, None)
    second = {n: t for n, t in tensors.items() if not n.startswith("blocks.0.")}
    write(folder / "model-1.safetensors", second, told)
    with pytest.raises(WeightsError, match="something else in model-"):
        loaded(tmp_path, folder)
