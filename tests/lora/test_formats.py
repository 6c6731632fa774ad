"""Files of every trainer's names, down to the changes of a model's weights."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cp_convert.bundle import manifest as m
from cp_convert.errors import WeightsError
from cp_convert.lora.change import Change, changed, delta
from cp_convert.lora.factors import read_factors, write_factors
from cp_convert.lora.parse import module_of, parse
from cp_convert.lora.read import read
from cp_convert.lora.targets import changes_of
from tests.bundle.test_folder import manifest as sample

DOWN, UP = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-1.0]])
FLUX_QKV = "transformer_blocks.0.attn.to_"


def bundle(
    tmp_path: Path, shapes: Mapping[str, list[int]], kind: str = "X", **more: Any
) -> m.Manifest:
    """A manifest with these weights, of which nothing is stored."""
    for rank in range(2):
        (tmp_path / f"rank{rank}.engine").write_bytes(b"x")
    told = sample(tmp_path)
    weights = [
        m.Weight(name=name, dtype=more.get("dtype", "float32"), shape=shape, file="w", bytes=4,
                 offset=4 * place, sha256="0" * 64)
        for place, (name, shape) in enumerate(shapes.items())
    ]  # fmt: skip
    model = msgspec.structs.replace(told.model, kind=kind)
    return msgspec.structs.replace(told, weights_mode="external", weights=weights, model=model)


def changes(
    tmp_path: Path, tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]],
    kind: str = "X", metadata: dict[str, str] | None = None, **more: Any,
) -> dict[str, Change]:  # fmt: skip
    file = tmp_path / "some.safetensors"
    save_file({name: t.clone().contiguous() for name, t in tensors.items()}, file, metadata)
    return changes_of(read(file), bundle(tmp_path, shapes, kind, **more))


PAIRS = {
    "diffusers": ("transformer.a_b.to_q.lora_A.weight", "transformer.a_b.to_q.lora_B.weight"),
    "PEFT": ("base_model.model.a_b.to_q.lora_A.weight", "base_model.model.a_b.to_q.lora_B.weight"),
    "adapter": ("a_b.to_q.lora_A.default.weight", "a_b.to_q.lora_B.default.weight"),
    "ComfyUI": ("diffusion_model.a_b.to_q.lora_down.weight",
                "diffusion_model.a_b.to_q.lora_up.weight"),
    "Kohya": ("lora_unet_a_b_to_q.lora_down.weight", "lora_unet_a_b_to_q.lora_up.weight"),
    "LyCORIS": ("lycoris_a_b_to_q.lora_down.weight", "lycoris_a_b_to_q.lora_up.weight"),
    "old": ("transformer.a_b.to_q.lora.down.weight", "transformer.a_b.to_q.lora.up.weight"),
}  # fmt: skip


@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS.keys())
def test_pairs_by_any_name_are_the_same_change(names: tuple[str, str], tmp_path: Path) -> None:
    found = changes(
        tmp_path, dict(zip(names, (DOWN, UP), strict=True)), {"a_b.to_q.weight": [2, 3]}
    )
    assert list(found) == ["a_b.to_q.weight"]
    assert torch.equal(delta(found["a_b.to_q.weight"], (2, 3)), UP @ DOWN)


def test_the_model_may_be_a_part_of_what_was_converted(tmp_path: Path) -> None:
    names = PAIRS["diffusers"]
    shapes = {"inner.a_b.to_q.weight": [2, 3], "a_b.other.weight": [1, 1]}
    assert list(changes(tmp_path, dict(zip(names, (DOWN, UP), strict=True)), shapes)) == [
        "inner.a_b.to_q.weight"
    ]


def test_a_flat_name_that_two_modules_have_is_none(tmp_path: Path) -> None:
    names = PAIRS["Kohya"]
    shapes = {"a_b.to_q.weight": [2, 3], "a.b_to_q.weight": [2, 3]}
    with pytest.raises(WeightsError, match="another model"):
        changes(tmp_path, dict(zip(names, (DOWN, UP), strict=True)), shapes)


def scale_of(tmp_path: Path, more: Mapping[str, Tensor], metadata: Any = None) -> float:
    tensors = {"x.lora_A.weight": torch.ones(4, 3), "x.lora_B.weight": torch.ones(2, 4), **more}
    return changes(tmp_path, tensors, {"x.weight": [2, 3]}, metadata=metadata)["x.weight"].scale


def told(**config: Any) -> dict[str, str]:
    config = {f"transformer.{name}": value for name, value in config.items()}
    return {"lora_adapter_metadata": msgspec.json.encode(config).decode()}


def test_alpha(tmp_path: Path) -> None:
    assert scale_of(tmp_path, {}) == 1
    assert scale_of(tmp_path, {"x.alpha": torch.tensor(2.0)}) == 0.5
    assert scale_of(tmp_path, {}, told(lora_alpha=8, r=4)) == 2
    assert scale_of(tmp_path, {}, told(lora_alpha=8, use_rslora=True)) == 4
    assert scale_of(tmp_path, {}, told(lora_alpha=8, alpha_pattern={"^x$": 4})) == 1
    assert scale_of(tmp_path, {}, told(lora_alpha=8, alpha_pattern={"other": 4})) == 2


def test_alpha_beside_pefts_own_file(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file({"x.lora_A.weight": torch.ones(4, 3), "x.lora_B.weight": torch.ones(2, 4)}, file)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 2}')
    assert read(file).weights[module_of("x")].scale == 0.5


def test_lokr_counts_alpha_where_a_factor_is_a_product(tmp_path: Path) -> None:
    whole = {"lycoris_x.lokr_w1": torch.ones(2, 1), "lycoris_x.alpha": torch.tensor(5.0)}
    halves = {"lycoris_x.lokr_w2_a": torch.ones(1, 2), "lycoris_x.lokr_w2_b": torch.ones(2, 3)}
    found = changes(tmp_path, whole | halves, {"x.weight": [2, 3]})["x.weight"]
    assert (found.kind, found.scale) == ("lokr", 2.5)
    second = {"lycoris_x.lokr_w2": torch.ones(1, 3)}
    assert changes(tmp_path, whole | second, {"x.weight": [2, 3]})["x.weight"].scale == 1


MAGNITUDES = (
    "lora_magnitude_vector", "lora_magnitude_vector.weight", "lora_magnitude_vector.default.weight",
    "dora_scale",
)  # fmt: skip


@pytest.mark.parametrize("name", MAGNITUDES)
def test_dora_by_any_name(name: str, tmp_path: Path) -> None:
    pair = {"x.lora_A.weight": DOWN, "x.lora_B.weight": UP, f"x.{name}": torch.tensor([3.0, 4.0])}
    found = changes(tmp_path, pair, {"x.weight": [2, 3]})["x.weight"]
    assert not found.additive
    assert torch.allclose(changed(torch.zeros(2, 3), [(found, 1.0)]).norm(dim=1),
                          torch.tensor([3.0, 4.0]))  # fmt: skip


def test_biases_and_whole_differences(tmp_path: Path) -> None:
    tensors = {
        "x.lora_A.weight": DOWN, "x.lora_B.weight": UP, "x.alpha": torch.tensor(0.5),
        "x.lora_B.bias": torch.tensor([1.0, 2.0]),
        "y.diff": torch.ones(5), "y.diff_b": torch.ones(4),
    }  # fmt: skip
    shapes = {"x.weight": [2, 3], "x.bias": [2], "y.weight": [5], "y.bias": [4]}
    found = changes(tmp_path, tensors, shapes)
    assert {name: (one.kind, one.scale) for name, one in found.items()} == {
        "x.weight": ("lora", 0.5), "x.bias": ("full", 0.5), "y.weight": ("full", 1),
        "y.bias": ("full", 1),
    }  # fmt: skip
    assert torch.equal(delta(found["x.bias"], (2,)), torch.tensor([0.5, 1.0]))


def test_factors_are_kept_as_they_are(tmp_path: Path) -> None:
    kept = {
        "a.weight": Change("lora", {"up": UP.half(), "down": DOWN.half()}, 1 / 3,
                           torch.tensor([1, 0]), torch.ones(2)),
        "b.weight": Change("lokr", {"w1": DOWN, "w2_a": UP, "w2_b": UP.T.to(torch.float8_e4m3fn)}),
        "b.bias": Change("full", {"full": UP}),
    }  # fmt: skip
    write_factors(kept, tmp_path / "f")
    found = read_factors(tmp_path / "f")
    for name, one in kept.items():
        assert (found[name].kind, found[name].scale) == (one.kind, one.scale)
        shape = (one.size[0], one.size[1])
        assert torch.equal(delta(found[name], shape), delta(one, shape))


# Names of the authors, through diffusers.


def numbered(rows: int, start: int = 0) -> Tensor:
    return torch.arange(start, start + rows, dtype=torch.float32)[:, None]


@pytest.mark.parametrize(
    "style",
    [
        "lora_unet_double_blocks_0_img_attn_qkv.lora_{}.weight",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_{}.weight",
        "base_model.model.double_blocks.0.img_attn.qkv.lora_{}.weight",
    ],
)
def test_flux_joined_qkv_goes_to_three_weights(style: str, tmp_path: Path) -> None:
    letters = ("down", "up") if "unet" in style else ("A", "B")
    tensors = dict(zip(map(style.format, letters), (DOWN, numbered(12)), strict=True))
    tensors[style.rpartition(".lora")[0] + ".alpha"] = torch.tensor(0.5)
    shapes = {f"{FLUX_QKV}{letter}.weight": [4, 3] for letter in "qkv"}
    found = changes(tmp_path, tensors, shapes, "FluxTransformer2DModel")
    whole = torch.cat([delta(found[f"{FLUX_QKV}{letter}.weight"], (4, 3)) for letter in "qkv"])
    assert torch.equal(whole, 0.5 * numbered(12) @ DOWN)


def test_flux_of_full_width_with_what_diffusers_leaves_out(tmp_path: Path) -> None:
    """LoKr and DoRA in these names, and ``final_layer``, whose halves change places."""
    one = "single_transformer_blocks.0"
    tensors = {
        "lora_unet_single_blocks_0_linear1.lora_down.weight": DOWN,
        "lora_unet_single_blocks_0_linear1.lora_up.weight": numbered(21504),
        "lora_unet_single_blocks_0_linear1.dora_scale": numbered(21504) + 1,
        "lora_unet_double_blocks_0_txt_attn_qkv.lokr_w1": torch.tensor([[1.0], [2.0], [3.0]]),
        "lora_unet_double_blocks_0_txt_attn_qkv.lokr_w2": numbered(4) @ DOWN,
        "lora_unet_final_layer_adaLN_modulation_1.lora_down.weight": DOWN,
        "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight": numbered(4),
    }
    added = {f"transformer_blocks.0.attn.add_{x}_proj.weight": [4, 3] for x in "qkv"}
    shapes = added | {
        **{f"{one}.attn.to_{x}.weight": [3072, 3] for x in "qkv"},
        f"{one}.proj_mlp.weight": [12288, 3], "norm_out.linear.weight": [4, 3],
    }  # fmt: skip
    found = changes(tmp_path, tensors, shapes, "FluxTransformer2DModel")
    assert set(found) == set(shapes)
    mlp = found[f"{one}.proj_mlp.weight"]
    assert mlp.magnitude is not None
    assert mlp.magnitude.tolist() == (numbered(12288, 9216) + 1).flatten().tolist()
    assert torch.equal(delta(mlp, (12288, 3)), numbered(12288, 9216) @ DOWN)
    joined = torch.cat([delta(found[name], (4, 3)) for name in added])
    assert torch.equal(joined, torch.kron(torch.tensor([[1.0], [2], [3]]), numbered(4) @ DOWN))
    swapped = delta(found["norm_out.linear.weight"], (4, 3))
    assert torch.equal(swapped, numbered(4)[[2, 3, 0, 1]] @ DOWN)


@pytest.mark.parametrize("style", ["diffusion_model.blocks.{}.{}.{}", "lora_unet_blocks_{}_{}_{}"])
def test_wan_also_when_only_some_modules_are_changed(style: str, tmp_path: Path) -> None:
    tensors = {}
    for number in range(2):
        name = style.format(number, "self_attn", "q")
        tensors |= {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": numbered(4)}
    shapes = {f"blocks.{i}.attn1.to_q.weight": [4, 3] for i in range(2)}
    found = changes(tmp_path, tensors, shapes, "WanTransformer3DModel")
    assert set(found) == set(shapes)
    assert all(torch.equal(delta(one, (4, 3)), numbered(4) @ DOWN) for one in found.values())


def test_a_magnitude_by_column_of_a_joined_weight_is_refused(tmp_path: Path) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": DOWN, f"{name}.lora_up.weight": numbered(12),
               f"{name}.dora_scale": torch.ones(1, 3)}  # fmt: skip
    shapes = {f"{FLUX_QKV}{letter}.weight": [4, 3] for letter in "qkv"}
    with pytest.raises(WeightsError, match="for every column of several weights"):
        changes(tmp_path, tensors, shapes, "FluxTransformer2DModel")


# What is refused.

X = {"x.lora_A.weight": DOWN, "x.lora_B.weight": UP}
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no LoRA": ({"x.weight": UP}, r"is no LoRA: no name ends as a factor's .*x\.weight"),
    "text encoder": ({"lora_te1_x.lora_down.weight": UP, "text_encoder.y.lora_A.weight": UP},
                     r"all its 2 tensors belong to other models, such as a text encoder"),
    "another model": ({"y.lora_A.weight": DOWN, "y.lora_B.weight": UP},
                      r"another model: none of its 1 modules is one of x \(X\); it has y"),
    "left over": ({**X, "y.lora_A.weight": DOWN, "y.lora_B.weight": UP},
                  r"1 of its 2 modules are none of x \(X\): y"),
    "unknown kind": ({**X, "y.hada_w1_a": UP, "y.hada_w1_b": UP},
                     r"2 tensors are of a kind that is not known: y\.hada_w1_a, y\.hada_w1_b"),
    "shape": ({"x.lora_A.weight": torch.ones(1, 4), "x.lora_B.weight": UP},
              r"changes x\.weight by a tensor of \[2, 4\], and the weight is \[2, 3\]"),
    "no B": ({"x.lora_A.weight": DOWN}, r"x has a lora_A \(down\) without its lora_B \(up\)"),
    "no A": ({"x.lora_B.weight": UP}, r"x has a lora_B \(up\) without its lora_A \(down\)"),
    "ranks": ({"x.lora_A.weight": torch.ones(2, 3), "x.lora_B.weight": UP},
              r"lora_A \(down\) of \[2, 3\] and a lora_B \(up\) of \[2, 1\], whose ranks differ"),
    "NaN": ({**X, "x.lora_B.weight": torch.tensor([[1.0], [torch.nan]])},
            r"x\.lora_B\.weight holds NaN or infinity"),
    "infinity": ({**X, "x.alpha": torch.tensor(torch.inf)}, r"x\.alpha holds NaN or infinity"),
    "alpha 0": ({**X, "x.alpha": torch.tensor(0.0)}, r"x has an alpha of 0; it has to be"),
    "alpha of two": ({**X, "x.alpha": torch.ones(2)}, r"x has an alpha of \[2\], not one number"),
    "integers": ({**X, "x.lora_B.weight": torch.ones(2, 1, dtype=torch.int8)},
                 r"stored as I8, and factors are floating numbers"),
    "no rank": ({"x.lora_A.weight": torch.ones(0, 3), "x.lora_B.weight": torch.ones(2, 0)},
                r"x\.lora_A\.weight holds no numbers: it is \[0, 3\]"),
    "no LoKr": ({"x.lokr_w1": torch.ones(0, 0), "x.lokr_w2": UP}, "lokr_w1 holds no numbers"),
    "nothing": ({}, "it holds no tensors"),
    "half a LoKr": ({"x.lokr_w1": DOWN, "x.lokr_w2_a": UP}, r"x has lokr_w2_a where lokr_w2, or"),
    "twice": ({**X, "x.lora_down.weight": DOWN},
              r"x\.lora_A\.weight and x\.lora_down\.weight mean the same"),
    "two kinds": ({**X, "x.diff": torch.ones(2, 3)}, r"x is changed twice, as lora and as full"),
    "alone": ({**X, "x2.alpha": torch.ones(())}, r"x2 has alpha and no factors"),
    "magnitude": ({**X, "x.dora_scale": torch.ones(3)}, r"the magnitude of x\.weight is \[3\]"),
    "no bias": ({**X, "x.diff_b": torch.ones(2)}, r"changes x\.bias, and the bundle's model has"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "message"), BAD.values(), ids=BAD.keys())
def test_bad_files(tensors: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message) as refused:
        changes(tmp_path, tensors, {"x.weight": [2, 3]})
    assert "some.safetensors" in refused.value.message
    assert refused.value.hint or refused.value.where


def test_metadata_that_is_nonsense(tmp_path: Path) -> None:
    for metadata in ({"lora_adapter_metadata": "[1"}, {"lora_adapter_metadata": "[1]"}):
        with pytest.raises(WeightsError, match="its configuration is no JSON object"):
            scale_of(tmp_path, {}, metadata)
    with pytest.raises(WeightsError, match="an alpha of 'much', which is no number"):
        scale_of(tmp_path, {}, told(lora_alpha="much"))


def test_a_weight_of_a_small_type_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"x\.weight is stored as float8_e4m3fn"):
        changes(tmp_path, X, {"x.weight": [2, 3]}, dtype="float8_e4m3fn")


def test_no_safetensors_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_bytes(b"PK\x03\x04 and so on")
    with pytest.raises(WeightsError, match="pickle"):
        read(tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match="is missing"):
        read(tmp_path / "none.safetensors")


def test_others_are_counted_and_not_taken() -> None:
    names = ["text_encoder_2.x.lora_A.weight", "transformer_2.x.lora_A.weight", "x.lora_A.weight",
             "lora_te_x.alpha", "te_proj.lora_A.weight"]  # fmt: skip
    found = parse(names)
    assert len(found.others) == 3
    assert [module.name for module in found.modules] == ["x", "te_proj"]
