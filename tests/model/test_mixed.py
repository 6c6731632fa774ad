"""ModelOpt's MIXED_PRECISION: every layer as it says and as it is stored, or refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.checkpoints.modelopt import (
    FP8,
    mixed,
    said,
    tensors_of,
    with_attention,
    write,
)
from cp_convert.errors import UsageError, WeightsError
from tests.model.test_modelopt import LAYERS, Damage, loaded, module, with_, without

EVERY = dict(zip(LAYERS, ("FP8", "W8A8_SQ_PER_CHANNEL", "NVFP4", "NVFP4_SVD"), strict=True))
Said = Callable[[dict[str, Any]], object]


def test_every_layer_is_what_is_said_of_it(tmp_path: Path) -> None:
    tensors = with_attention(mixed(module(), EVERY), ["blocks.1"])
    write(tmp_path / "weights", tensors, layers=said(EVERY))
    source = loaded(tmp_path)
    held, truth = dict(source.module.named_parameters()), module().state_dict()
    assert sorted(source.codes) == sorted(f"{layer}.weight" for layer in LAYERS)
    assert list(source.attentions) == ["blocks.1"]
    for layer, algorithm in EVERY.items():
        name, one = f"{layer}.weight", source.codes[f"{layer}.weight"]
        assert torch.equal(one.codes.view(torch.uint8), tensors[name].view(torch.uint8))
        assert one.input_scale == tensors[f"{layer}.input_scale"].item()
        assert (one.rows is not None) == (algorithm == "W8A8_SQ_PER_CHANNEL")
        assert (one.blocks is not None) == algorithm.startswith("NVFP4")
        assert (one.low_rank is not None) == (algorithm == "NVFP4_SVD")
        assert (one.smooth is not None) == (algorithm in ("W8A8_SQ_PER_CHANNEL", "NVFP4_SVD"))
        error = (held[name] - truth[name]).norm() / truth[name].norm()
        assert error < (0.15 if algorithm.startswith("NVFP4") else 0.04)


def test_the_layer_that_is_multiplied_by_the_fewest_gpus_decides(tmp_path: Path) -> None:
    write(tmp_path / "weights", mixed(module(), EVERY), layers=said(EVERY))
    assert loaded(tmp_path, compute_capabilities=("12.0",)).codes
    for old, kind in (("8.6", "FP8"), ("8.9", "NVFP4")):
        with pytest.raises(UsageError, match=rf"--compute-capability {old}: .* are {kind}, which"):
            loaded(tmp_path, compute_capabilities=("12.0", old))
    two = {layer: own for layer, own in EVERY.items() if not own.startswith("NVFP4")}
    write(tmp_path / "weights", mixed(module(), two), layers=said(two))
    assert len(loaded(tmp_path, compute_capabilities=("8.9",)).codes) == 2


def test_a_scheme_gives_factors_to_all_layers_of_a_kind(tmp_path: Path) -> None:
    """FP8 layers with AWQ's factors stand beside NVFP4 layers without."""
    kinds = {layer: "FP8" if "qkv" in layer else "NVFP4" for layer in LAYERS}
    tensors = mixed(module(), kinds)
    smooth = tensors_of(module(), LAYERS, smooth=True)
    tensors |= {name: t for name, t in smooth.items() if ".qkv." in name}
    write(tmp_path / "weights", tensors, layers=said(kinds))
    codes = loaded(tmp_path).codes
    assert [name for name, one in codes.items() if one.smooth is not None] == [
        "blocks.0.qkv.weight", "blocks.1.qkv.weight"
    ]  # fmt: skip
    del tensors["blocks.1.qkv.pre_quant_scale"]
    write(tmp_path / "weights", tensors, layers=said(kinds))
    told = "blocks.1.qkv.pre_quant_scale is missing: .* in FP8.*, which 1 of 2 FP8 layers have"
    with pytest.raises(WeightsError, match=told):
        loaded(tmp_path)


def test_awq_beside_nvfp4(tmp_path: Path) -> None:
    """What ModelOpt's AWQ makes of NVFP4 is NVFP4 with factors, and says that it has them."""
    low = mixed(module(), dict.fromkeys(LAYERS, "NVFP4_SVD"))
    tensors = {name: t for name, t in low.items() if "svdquant" not in name}
    kinds = dict.fromkeys(LAYERS, "NVFP4_AWQ")
    write(tmp_path / "weights", tensors, "NVFP4_AWQ")
    assert all(one.smooth is not None for one in loaded(tmp_path).codes.values())
    write(tmp_path / "weights", tensors, layers=said(kinds))
    assert all(one.smooth is not None for one in loaded(tmp_path).codes.values())
    plain = {name: t for name, t in tensors.items() if "pre_quant" not in name}
    write(tmp_path / "weights", plain, "NVFP4_AWQ")
    with pytest.raises(WeightsError, match=r"pre_quant_scale is missing: .*, and NVFP4_AWQ has it"):
        loaded(tmp_path)


def changed(layer: str, **values: object) -> Said:
    return lambda layers: layers[layer].update(values)


def refused(tmp_path: Path, tensors: dict[str, Tensor], layers: Any, told: str) -> None:
    write(tmp_path / "weights", tensors, layers=layers)
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda layers: layers.clear(), "MIXED_PRECISION, and no quantized_layers"),
        (changed("blocks.0.qkv", quant_algo="W4A16_AWQ"), "blocks.0.qkv .* to W4A16_AWQ, of which"),
        (changed("blocks.1.out", quant_algo="fp8_pb_wo"), "blocks.1.out .* to fp8_pb_wo, of which"),
        (changed("blocks.1.out", quant_algo=["FP8"]), r"blocks.1.out .* to \['FP8'\], of which"),
        (lambda layers: layers.update({"blocks.0.qkv": "FP8"}), "blocks.0.qkv .* to FP8, of which"),
        (lambda layers: layers.update({"blocks.0.qkv": {}}), "blocks.0.qkv .* to {}, of which"),
        (changed("blocks.1.qkv", group_size=32), "blocks.1.qkv .* NVFP4 with a group_size of 32"),
        (changed("blocks.1.qkv", group_size="16"), "blocks.1.qkv .* with a group_size of 16, wh"),
        (changed("blocks.1.qkv", group_size=True), "blocks.1.qkv .* NVFP4 with a group_size of Tr"),
        (changed("blocks.0.qkv", group_size=128), "blocks.0.qkv .* FP8 with a group_size of 128"),
        (changed("blocks.1.out", has_zero_point=True), "blocks.1.out .* with a zero point"),
        (changed("blocks.0.out", bits=7), "blocks.0.out .*PER_CHANNEL with bits, which is not"),
        (changed("blocks.0.out", pre_quant_scale="no"), "blocks.0.out .* pre_quant_scale of no,"),
        (
            changed("blocks.0.qkv", pre_quant_scale=True),
            "blocks.0.qkv is FP8, .*blocks.0.qkv.pre_quant_scale is missing",
        ),
        (
            changed("blocks.0.out", pre_quant_scale=False),
            "blocks.0.out is W8A8_SQ.*, and that it has no .*blocks.0.out.pre_quant_scale is there",
        ),
        (
            changed("blocks.0.qkv", quant_algo="W8A8_SQ_PER_CHANNEL"),
            "that blocks.0.qkv is W8A8_SQ.* blocks.0.qkv.weight .* is stored as F8_E4M3",
        ),
        (
            changed("blocks.0.out", quant_algo="FP8"),
            "that blocks.0.out is FP8, and blocks.0.out.weight .* is stored as I8",
        ),
        (
            changed("blocks.1.out", quant_algo="NVFP4"),
            "that blocks.1.out is NVFP4, and blocks.1.out.svdquant_lora_a is there",
        ),
        (
            changed("blocks.1.qkv", quant_algo="NVFP4_SVD"),
            "blocks.1.qkv.(pre_quant_scale|svdquant_lora_a) is missing.* 1 of 2 NVFP4_SVD layers",
        ),
        (
            lambda layers: layers.pop("blocks.1.qkv"),
            "not name blocks.1.qkv.weight, .* stored as U8",
        ),
        (
            lambda layers: layers.update(leave={"quant_algo": "FP8"}),
            "that leave is FP8, and leave.weight .* is stored as BF16",
        ),
        (
            lambda layers: layers.update({"blocks.7.out": {"quant_algo": "FP8"}}),
            "that blocks.7.out is FP8, and blocks.7.out.weight is not there",
        ),
    ],
)
def test_what_is_said_of_a_layer_and_is_not_so(change: Said, told: str, tmp_path: Path) -> None:
    layers = said(EVERY)
    change(layers)
    refused(tmp_path, mixed(module(), EVERY), layers, told)


def filled(value: float, *shape: int) -> Tensor:
    found = torch.ones(shape)
    found[-1] = value
    return found


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (without("blocks.0.qkv.weight_scale"), "blocks.0.qkv.weight_scale is missing.* in FP8"),
        (without("blocks.0.out.input_scale"), "blocks.0.out.input_scale is missing.* in INT8"),
        (without("blocks.1.qkv.weight_scale_2"), "qkv.weight_scale_2 is missing.* in NVFP4"),
        (without("blocks.1.out.svdquant_lora_b"), "blocks.1.out.svdquant_lora_b is missing"),
        (without("blocks.1.out.pre_quant_scale"), "out.pre_quant_scale is missing"),
        (with_("blocks.0.qkv.weight_scale", torch.tensor(-1.0)), "qkv.weight_scale .* is -1.0"),
        (with_("blocks.0.qkv.input_scale", torch.tensor(torch.nan)), "qkv.input_scale .* is nan"),
        (with_("blocks.0.qkv.input_scale", torch.ones(64)), r"0.qkv.input_scale .* F32\[64\]"),
        (with_("blocks.0.out.weight_scale", torch.tensor(1.0)), r"F32\[\]; there are 64 rows"),
        (with_("blocks.0.out.weight_scale", filled(torch.inf, 64)), "out.weight_scale .* is inf"),
        (with_("blocks.0.out.pre_quant_scale", filled(-1, 64)), "pre_quant_scale .* is -1.0"),
        (with_("blocks.1.qkv.weight_scale_2", torch.tensor(0.0)), "qkv.weight_scale_2 .* is 0.0"),
        (
            with_("blocks.1.qkv.weight_scale", torch.ones(192, 2).to(FP8)),
            r"blocks.1.qkv.weight_scale .* blocks of 16 have scales F8_E4M3\[192, 4\]",
        ),
        (with_("blocks.0.qkv.weight_scale_2", torch.ones(())), "qkv.weight is .* F8.* to NVFP4"),
        (with_("blocks.0.out.svdquant_lora_a", torch.ones(8, 64)), "out.svdquant_lora_a is there"),
        (with_("leave.weight_scale", torch.ones(())), "leave.weight .* BF16 and not .* to FP8 or"),
        (with_("blocks.7.out.input_scale", torch.ones(())), "blocks.7.out.weight is not there"),
        (with_("leave.weight", torch.ones(16, 64).to(FP8)), "not name leave.weight, .* as F8_E4M3"),
        (
            with_("leave.weight", torch.ones(16, 64).char()),
            "not name leave.weight, .* stored as I8",
        ),
        (with_("blocks.0.qkv.weight", torch.ones(192, 64).bfloat16()), "qkv is FP8, .* as BF16"),
        (without("blocks.0.qkv.weight"), "qkv is FP8, and blocks.0.qkv.weight is not there"),
        (
            with_("blocks.0.qkv.weight", torch.full((192, 64), torch.nan).to(FP8)),
            "blocks.0.qkv.weight .* holds NaN",
        ),
    ],
)
def test_what_is_stored_of_a_layer_and_is_none(damage: Damage, told: str, tmp_path: Path) -> None:
    tensors = mixed(module(), EVERY)
    damage(tensors)
    refused(tmp_path, tensors, said(EVERY), told)


@pytest.mark.parametrize("what", ["pre_quant_scale", "svdquant_lora_a"])
def test_factors_that_all_layers_of_a_kind_lack(what: str, tmp_path: Path) -> None:
    tensors = {n: t for n, t in mixed(module(), EVERY).items() if what.rstrip("ab") not in n}
    layers = said(EVERY)
    layers["blocks.1.out"].pop("pre_quant_scale")
    refused(tmp_path, tensors, layers, f"blocks.1.out.{what} is missing: .* NVFP4_SVD has it")


def test_a_layer_that_is_named_twice(tmp_path: Path) -> None:
    folder = write(tmp_path / "weights", mixed(module(), EVERY), layers=said(EVERY))
    text = (folder / "config.json").read_text()
    again = '"blocks.0.qkv": {"quant_algo": "NVFP4"}, '
    (folder / "config.json").write_text(text.replace('"blocks.0.qkv"', again + '"blocks.0.qkv"'))
    with pytest.raises(WeightsError, match=r"cannot be read: it names blocks.0.qkv twice"):
        loaded(tmp_path)
    (folder / "config.json").write_text(text[:-2])
    with pytest.raises(WeightsError, match=r"quantized_layers of config.json cannot be read"):
        loaded(tmp_path)
