"""Single files of FP8 codes: what is read, where it stays, and what is refused by name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks.checkpoints.authors import (
    FLUX_LAYERS,
    original_flux,
    original_flux2,
    original_wan,
    smaller_flux,
)
from benchmarks.checkpoints.comfy import FP8, STYLES, as_json, quantized, write
from cp_convert.errors import UsageError, WeightsError
from cp_convert.ir.source import Source
from cp_convert.ir.tensors import bytes_of, tensor_at
from cp_convert.model.checkpoint import locate
from cp_convert.model.formats import without_scales
from cp_convert.model.load import load, surroundings
from cp_convert.model.meta import unallocated
from cp_convert.model.weights import load_weights
from tests.model.test_modelopt import LAYERS, job, module
from tests.model.test_original import wan
from tests.runtime.bundles import FLUX, QWEN
from tests.runtime.test_tensor import FLUX2

QKV = "double_blocks.0.img_attn.qkv"


def built(text: str) -> nn.Module:
    space: dict[str, object] = {}
    exec(text, space)
    made: nn.Module = space["build_model"]()  # type: ignore[operator]
    return made


def loaded(tmp_path: Path, file: Path, model: str | None = None, **options: object) -> Source:
    asked = job(tmp_path, weights=file, **options)
    if model is not None:
        asked.model.write_text(model)
    with surroundings(asked):
        return load(asked)


def check_codes(source: Source, stored: dict[str, Tensor], made_of: dict[str, str]) -> None:
    """Every number stands for what the file's codes do, and lies where it is said to."""
    held = dict(source.module.named_parameters())
    assert set(source.codes) == {f"{layer}.weight" for layer in made_of}
    for name, one in source.codes.items():
        theirs = made_of[name.removesuffix(".weight")]
        scales = [stored.get(f"{theirs}.{x}") for x in ("scale_weight", "weight_scale")]
        scale = next(x for x in scales if x is not None)
        assert one.weight_scale == scale.item()
        assert torch.equal(held[name], (one.codes.float() * one.weight_scale).bfloat16())
        at = source.located[name]
        raw = tensor_at(at, bytes_of(at.file)).view(torch.uint8)
        assert torch.equal(raw, one.codes.view(torch.uint8))


def made_of_flux() -> dict[str, str]:
    """The stored layer that each of FLUX's quantized layers comes from."""
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    own = {}
    for x, ours in (("img", "attn.to_{}"), ("txt", "attn.add_{}_proj")):
        own |= {f"{double}.{ours.format(y)}": f"double_blocks.0.{x}_attn.qkv" for y in "qkv"}
    for x, out, ff in (("img", "attn.to_out.0", "ff"), ("txt", "attn.to_add_out", "ff_context")):
        own[f"{double}.{out}"] = f"double_blocks.0.{x}_attn.proj"
        own[f"{double}.{ff}.net.0.proj"] = f"double_blocks.0.{x}_mlp.0"
        own[f"{double}.{ff}.net.2"] = f"double_blocks.0.{x}_mlp.2"
    own |= {f"{single}.attn.to_{y}": "single_blocks.0.linear1" for y in "qkv"}
    own[f"{single}.proj_mlp"] = "single_blocks.0.linear1"
    own[f"{single}.proj_out"] = "single_blocks.0.linear2"
    return own


@pytest.mark.parametrize(
    ("style", "prefix"),
    [*((style, "") for style in STYLES), ("fp8_scaled", "model.diffusion_model.")],
)
def test_scales_follow_the_split_of_flux(
    style: str, prefix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("diffusers")
    smaller_flux(monkeypatch, 64)
    truth = built(FLUX)
    tensors, metadata = quantized(original_flux(truth), FLUX_LAYERS, style)
    file = write(tmp_path / "flux.safetensors", tensors, metadata, prefix)
    source = loaded(tmp_path, file, FLUX)
    check_codes(source, tensors, made_of_flux())
    held = dict(source.module.named_parameters())
    for name, tensor in truth.state_dict().items():
        if name not in source.codes:
            assert torch.equal(held[name], tensor.bfloat16()), name
        else:
            assert (held[name].float() - tensor).abs().max() < 0.07 * tensor.abs().max()
    inputs = {one.input_scale for one in source.codes.values()}
    assert len(inputs) == len(FLUX_LAYERS)
    assert "transformer_blocks.0.attn.to_k.weight" in source.located
    assert "norm_out.linear.weight" not in source.located


def test_a_reordered_layer_keeps_its_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halves that diffusers swaps are other bytes than the file's, and have the same scale."""
    pytest.importorskip("diffusers")
    smaller_flux(monkeypatch, 64)
    layer = "final_layer.adaLN_modulation.1"
    truth = built(FLUX)
    tensors, _ = quantized(original_flux(truth), [layer])
    source = loaded(tmp_path, write(tmp_path / "flux.safetensors", tensors, {}), FLUX)
    (name,) = source.codes
    assert name == "norm_out.linear.weight"
    assert name not in source.located
    shift, scale = tensors[f"{layer}.weight"].chunk(2)
    own = source.codes[name]
    assert torch.equal(own.codes.view(torch.uint8), torch.cat([scale, shift]).view(torch.uint8))
    assert own.weight_scale == tensors[f"{layer}.scale_weight"].item()


@pytest.mark.parametrize("style", STYLES)
def test_qwen_has_the_names_of_diffusers_and_a_prefix(style: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    truth = built(QWEN)
    named = {n: t.detach().bfloat16() for n, t in truth.state_dict().items()}
    layers = [
        name
        for name, one in truth.named_modules()
        if isinstance(one, nn.Linear) and ("attn" in name or "mlp" in name)
    ]
    assert len(layers) == 12
    tensors, metadata = quantized(named, layers, style)
    prefix = "model.diffusion_model."
    if metadata:  # which may name layers with the prefix as well
        told = json.loads(metadata["_quantization_metadata"])
        told["layers"] = {prefix + name: one for name, one in told["layers"].items()}
        metadata = {"_quantization_metadata": json.dumps(told)}
    file = write(tmp_path / "qwen.safetensors", tensors, metadata, prefix)
    source = loaded(tmp_path, file, QWEN)
    check_codes(source, tensors, {layer: layer for layer in layers})


@pytest.mark.parametrize("style", STYLES)
def test_flux2_is_read_likewise(style: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    tensors, metadata = quantized(original_flux2(built(FLUX2)), FLUX_LAYERS, style)
    source = loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, metadata), FLUX2)
    double, single = "transformer_blocks.0", "single_transformer_blocks.0"
    own = {n: m for n, m in made_of_flux().items() if n.startswith(f"{double}.attn.")}
    for x, ff in (("img", "ff"), ("txt", "ff_context")):
        own[f"{double}.{ff}.linear_in"] = f"double_blocks.0.{x}_mlp.0"
        own[f"{double}.{ff}.linear_out"] = f"double_blocks.0.{x}_mlp.2"
    own[f"{single}.attn.to_qkv_mlp_proj"] = "single_blocks.0.linear1"
    own[f"{single}.attn.to_out"] = "single_blocks.0.linear2"
    check_codes(source, tensors, own)


@pytest.mark.parametrize("style", STYLES)
def test_wans_names_are_the_authors(style: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    truth = wan()
    theirs = {name: t.bfloat16() for name, t in original_wan(truth).items()}
    layers = [f"blocks.{i}.{x}" for i in (0, 1) for x in ("self_attn.q", "cross_attn.k", "ffn.2")]
    tensors, metadata = quantized(theirs, layers, style)
    path = write(tmp_path / "wan.safetensors", tensors, metadata, "model.diffusion_model.")
    rest, coded = without_scales(locate(path), path)
    with unallocated():
        module = wan().bfloat16()
    filled = load_weights(module, rest, path, coded=coded)
    ours = {"self_attn.q": "attn1.to_q", "cross_attn.k": "attn2.to_k", "ffn.2": "ffn.net.2"}
    made_of = {
        f"{layer[:8]}.{ours[layer[9:]]}": layer for layer in layers
    }  # blocks.0, and what follows the dot
    assert set(filled.codes) == {f"{layer}.weight" for layer in made_of}
    for name, one in filled.codes.items():
        theirs_ = made_of[name.removesuffix(".weight")]
        assert torch.equal(one.codes.float(), tensors[f"{theirs_}.weight"].float())
        assert filled.located[name].dtype == FP8
    assert set(filled.located) == {name for name, _ in truth.named_parameters()}


def named() -> dict[str, Tensor]:
    return {name: t.detach().bfloat16() for name, t in module().state_dict().items()}


def test_a_scale_of_one_is_none(tmp_path: Path) -> None:
    tensors, _ = quantized(named(), LAYERS)
    tensors["blocks.0.qkv.scale_input"] = torch.tensor(1.0)
    del tensors["blocks.1.out.scale_input"]
    source = loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, {}))
    assert {n: one.input_scale is None for n, one in source.codes.items()} == {
        "blocks.0.qkv.weight": True,
        "blocks.0.out.weight": False,
        "blocks.1.qkv.weight": False,
        "blocks.1.out.weight": True,
    }
    assert "2 weights in FP8 without a scale for the layer's input: they stay" in source.told[-1]
    source = loaded(tmp_path, tmp_path / "x.safetensors", quantize="fp8")
    assert "taken from the example inputs" in source.told[-1]


def full_precision(tensors: dict[str, Tensor]) -> None:
    tensors["scaled_fp8"] = torch.zeros(2).to(FP8)


def full_precision_in_json(tensors: dict[str, Tensor]) -> None:
    for layer in LAYERS:
        told = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}
        tensors[f"{layer}.comfy_quant"] = as_json(told)


@pytest.mark.parametrize(
    ("style", "change"),
    [("fp8_scaled", full_precision), ("comfy_quant", full_precision_in_json)],
)
def test_products_in_full_precision_are_no_codes(
    style: str, change: Callable[[dict[str, Tensor]], None], tmp_path: Path
) -> None:
    tensors, metadata = quantized(named(), LAYERS, style)
    change(tensors)
    source = loaded(tmp_path, write(tmp_path / "x.safetensors", tensors, metadata))
    assert [one.input_scale for one in source.codes.values()] == [None] * 4


def test_codes_can_be_taken_for_their_numbers(tmp_path: Path) -> None:
    tensors, metadata = quantized(named(), LAYERS, "metadata")
    file = write(tmp_path / "x.safetensors", tensors, metadata)
    source = loaded(tmp_path, file, allow_cast=("float8",), compute_capabilities=("8.0", "8.9"))
    assert not source.codes
    assert not {f"{layer}.weight" for layer in LAYERS} & set(source.located)
    assert [(c.stored, c.computed, c.tensors) for c in source.casts] == [
        ("float8_e4m3fn", "bfloat16", 4)
    ]
    assert "4 weights in FP8 multiplied by their scales once" in source.told[-1]
    held = dict(source.module.named_parameters())
    for layer in LAYERS:
        numbers = tensors[f"{layer}.weight"].float() * tensors[f"{layer}.weight_scale"]
        assert torch.equal(held[f"{layer}.weight"], numbers.bfloat16())


def test_what_it_cannot_be_converted_for(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", *quantized(named(), LAYERS))
    with pytest.raises(UsageError, match=r"--compute-capability 8\.6: its weights") as caught:
        loaded(tmp_path, file, compute_capabilities=("8.9", "8.6"))
    assert "--allow-cast float8" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="is quantized already"):
        loaded(tmp_path, file, quantize="fp8")


Damage = Callable[[dict[str, Tensor]], object]


def without(name: str) -> Damage:
    return lambda tensors: tensors.pop(name)


def with_(name: str, value: Tensor) -> Damage:
    return lambda tensors: tensors.update({name: value})


OUT = "blocks.0.out"


@pytest.mark.parametrize(
    ("style", "damage", "told"),
    [
        (0, without(f"{OUT}.scale_weight"), f"{OUT}.scale_weight is missing"),
        (1, without(f"{OUT}.weight_scale"), f"{OUT}.weight_scale is missing"),
        (2, without(f"{OUT}.weight_scale"), f"{OUT}.weight_scale is missing"),
        (0, with_(f"{OUT}.scale_weight", torch.tensor(-1.0)), "out.scale_weight .* is -1.0"),
        (0, with_(f"{OUT}.scale_input", torch.tensor(0.0)), "out.scale_input .* is 0.0"),
        (1, with_(f"{OUT}.weight_scale", torch.tensor(torch.nan)), "weight_scale .* is nan"),
        (1, with_(f"{OUT}.input_scale", torch.tensor(torch.inf)), "input_scale .* is inf"),
        (0, with_(f"{OUT}.scale_weight", torch.ones(64)), r"scale_weight .* F32\[64\]"),
        (0, with_(f"{OUT}.scale_weight", torch.ones((), dtype=torch.int8)), r"is I8\[\]"),
        (0, with_("leave.scale_weight", torch.tensor(1.0)), "leave.weight is stored as BF16"),
        (1, with_("leave.weight_scale", torch.tensor(1.0)), "leave.weight is stored as BF16"),
        (1, with_("leave.comfy_quant", as_json({"format": "float8_e4m3fn"})), "leave.* as BF16"),
        (0, with_("blocks.7.out.scale_input", torch.tensor(1.0)), "blocks.7.out.weight is not th"),
        (0, with_(f"{OUT}.weight_scale", torch.tensor(1.0)), "out has scales of two formats"),
        (1, without(f"{OUT}.comfy_quant"), "out has scales of two formats, or the file does not"),
        (1, with_(f"{OUT}.comfy_quant", as_json({"format": "nvfp4"})), "not quantized to NVFP4"),
        (1, with_(f"{OUT}.comfy_quant", as_json({})), "out .* quantized as None"),
        (1, with_(f"{OUT}.comfy_quant", as_json([1])), r"out .* quantized as \[1\]"),
        (
            1,
            with_(f"{OUT}.comfy_quant", as_json({"format": "float8_e4m3fn", "convrot": True})),
            "float8_e4m3fn with convrot",
        ),
        (
            1,
            with_(
                f"{OUT}.comfy_quant",
                as_json({"format": "float8_e4m3fn", "full_precision_matrix_mult": "false"}),
            ),
            "full_precision_matrix_mult 'false'",
        ),
        (1, with_(f"{OUT}.comfy_quant", as_json({})[:1]), "no JSON that can be read"),
        (1, with_(f"{OUT}.comfy_quant", torch.ones(2)), "quantized as F32"),
        (0, with_("scaled_fp8", torch.zeros(0).to(torch.float8_e5m2)), "scaled_fp8 .* F8_E5M2"),
        (0, with_(f"{OUT}.weight", torch.zeros(64, 64).to(torch.float8_e5m2)), "as F8_E5M2"),
        (0, with_(f"{OUT}.bias", torch.zeros(64).to(FP8)), "out.bias .* is quantized"),
        (0, with_(f"{OUT}.weight", torch.zeros(64, 32).to(FP8)), "1 of another shape"),
        (0, with_(f"{OUT}.weight", torch.full((64, 64), torch.nan).to(FP8)), "out.weight .* NaN"),
        (0, with_(f"{OUT}.pre_quant_scale", torch.ones(64)), "1 unexpected"),
        (1, with_(f"{OUT}.weight_scale_2", torch.ones(())), "weight_scale_2 .* of two formats"),
    ],
)  # fmt: skip
def test_what_is_no_such_file_is_refused_by_name(
    style: int, damage: Damage, told: str, tmp_path: Path
) -> None:
    tensors, metadata = quantized(named(), LAYERS, STYLES[style])
    damage(tensors)
    file = write(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path, file)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "_quantization_metadata .* no JSON that can be read"),
        ('{"layers": {"a": {}, "a": {}}}', "names a twice"),
        ('{"layers": []}', "something without layers"),
        ('{"layers": {"blocks.0.out": {"format": "mxfp8"}}}', "blocks.0.out .* as mxfp8"),
        ('{"layers": {"blocks.9.out": {"format": "float8_e4m3fn"}}}', "blocks.*is not there|scale"),
    ],
)
def test_metadata_that_says_something_else(text: str, told: str, tmp_path: Path) -> None:
    tensors, _ = quantized(named(), LAYERS, "metadata")
    metadata = {"_quantization_metadata": text}
    file = write(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(WeightsError, match=told):
        loaded(tmp_path, file)


BYTE, FLOAT = torch.ones(8, dtype=torch.uint8), torch.ones(8)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"a.weight.quant_state.bitsandbytes__nf4": BYTE}, "by bitsandbytes, .* weights alone"),
        ({"a.weight": BYTE, "a.SCB": FLOAT}, "a.SCB .* by bitsandbytes"),
        ({"a.qweight": BYTE, "a.wscales": FLOAT}, r"a.wscales .* by Nunchaku \(SVDQuant\)"),
        ({"a.qweight": BYTE, "a.qzeros": BYTE, "a.scales": FLOAT}, "a.qzeros .* by AWQ or GPTQ"),
        ({"a.weight._data": BYTE, "a.weight._scale": FLOAT}, "a.weight._.* by quanto"),
        ({"a.weight": BYTE, "a.weight_scale": FLOAT.to(torch.float8_e8m0fnu)}, "by MXFP8"),
    ],
)
def test_other_quantizers_are_called_by_their_names(
    tensors: dict[str, Tensor], told: str, tmp_path: Path
) -> None:
    own = {name: tensor.clone() for name, tensor in tensors.items()}
    file = write(tmp_path / "x.safetensors", own, {})
    with pytest.raises(WeightsError, match=told) as caught:
        loaded(tmp_path, file)
    assert "--quantize" in (caught.value.hint or "")
    others = {"text." + name: tensor for name, tensor in own.items()}
    theirs = {f"model.diffusion_model.{name}": tensor for name, tensor in named().items()}
    file = write(tmp_path / "x.safetensors", {**theirs, **others}, {})
    assert not loaded(tmp_path, file).codes  # those of another model in the file are not looked at


def test_gguf_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03" + bytes(80))
    with pytest.raises(WeightsError, match=r"x.gguf is a GGUF file \(quantized\)"):
        loaded(tmp_path, tmp_path / "x.gguf")


def test_pieces_with_scales_of_their_own_are_not_joined(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a mapping would that makes one layer of two; and with a piece that is not codes."""
    pytest.importorskip("diffusers")
    from diffusers.loaders import single_file_model

    def mapping(checkpoint: dict[str, Tensor], **_: object) -> dict[str, Tensor]:
        own = dict(checkpoint)
        pieces = [own.pop("a.weight"), own.pop("b.weight")]
        return {"proj_out.weight": torch.cat(pieces), **own}

    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["QwenImageTransformer2DModel"]
    monkeypatch.setitem(known, "checkpoint_mapping_fn", mapping)
    whole = {n: t.detach().bfloat16() for n, t in built(QWEN).state_dict().items()}
    a, b = whole.pop("proj_out.weight").chunk(2)
    other = {f"of.{n}" if "block" in n else n: t for n, t in whole.items()}
    for layers, told in ((["a", "b"], "pieces whose scales differ"), (["a"], "Promotion")):
        tensors, _ = quantized({**other, "a.weight": a, "b.weight": 2 * b}, layers)
        file = write(tmp_path / "x.safetensors", tensors, {})
        with pytest.raises(WeightsError, match=told):
            loaded(tmp_path, file, QWEN)
