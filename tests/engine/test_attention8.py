"""Engines with attention over FP8 codes: what their kernels read, out of the engines themselves."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.checkpoints.modelopt import (
    FILE,
    in_nvfp4,
    smoothed,
    tensors_of,
    with_attention,
    write,
)
from benchmarks.plans import Plan, read_plan
from cp_convert.backends import BACKENDS
from cp_convert.capture import attention8
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import build, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.specialise import specialise
from cp_convert.prove import Stages, flat_inputs, measure, prove, prove_networks
from cp_convert.sharding.shard import shard
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import TINY_PLAN, axis_of, networks_of, sharpened, strategy, table, tiny
from tests.engine.test_quantized import check_proof, check_run, converted, dense_of
from tests.engine.test_quantized_models import FLUX2, layers_of
from tests.runtime.bundles import FLUX, QWEN, WAN

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])
SLOW = pytest.mark.slow
FP8 = "fp8_e4m3"
HALF = ("bf16", "bf16", "bf16")


def built(name: str, world: int, path: Path, dtype: torch.dtype, **sizes: int) -> Plan:
    """Two attentions, one over all ranks' tokens and one over a text that every rank has."""
    tokens, text = sizes.pop("tokens", 64), sizes.pop("text", 40)
    inputs = {"x": torch.randn(1, tokens, 8).to(dtype), "text": torch.randn(1, text, 8).to(dtype)}
    program, _ = trace(tiny(**{"heads": 8, "width": 256, **sizes}).to(dtype), inputs, TINY_PLAN)
    plain = decompose(program, table())
    steps = {n.name: (0.01, 0.02, 0.03) for n in attention8.choose(plain)[0]}
    split, axis = shard(attention8.over_codes(plain, steps), axis_of(world)), axis_of(world)
    done, _ = rewrite(split, strategy(name, world), name, axis, table())
    build(specialise(lower(done), 0), 0, path, ["8.9", "12.0"])
    return read_plan(path)


@pytest.mark.parametrize(
    ("name", "world", "count"),
    [
        ("ulysses", 2, 2),
        ("stream-kv", 4, 5),
        pytest.param("allgather-kv", 2, 2, marks=SLOW),
        pytest.param("ulysses", 4, 2, marks=SLOW),
        pytest.param("allgather-kv", 4, 2, marks=SLOW),
        pytest.param("ring", 2, 2, marks=SLOW),
        pytest.param("usp", 4, 2, marks=SLOW),
    ],
)
def test_kernels_read_codes(name: str, world: int, count: int, tmp_path: Path) -> None:
    """A head of 32 numbers: a factor of scores that bfloat16 does not hold."""
    plan = built(name, world, tmp_path / "engine", torch.bfloat16)
    assert plan.attentions() == count * [(FP8, FP8, FP8)]


def test_what_would_not_be_fused_is_left_alone(tmp_path: Path) -> None:
    """Few keys; the others are codes all the same."""
    plan = built("ulysses", 2, tmp_path / "engine", torch.float16, text=31)
    assert sorted(plan.attentions()) == [(FP8, FP8, FP8), ("half", "half", "half")]


class Kinds(nn.Module):
    """An attention with a mask of booleans, one of numbers, one in order, and one of groups."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(8, 3 * 128) for _ in range(4))
        self.leave = nn.Linear(4 * 128, 8)

    def forward(self, x: Tensor, seen: Tensor, added: Tensor) -> Tensor:
        given: list[dict[str, Any]] = [
            {"attn_mask": seen},
            {"attn_mask": added},
            {"is_causal": True},
            {"enable_gqa": True},
        ]
        found = []
        for layer, more in zip(self.qkv, given, strict=True):
            q, k, v = layer(x).unflatten(-1, (3, 4, 32)).permute(2, 0, 3, 1, 4)
            k, v = (one[:, :2] if "enable_gqa" in more else one for one in (k, v))
            mixed = functional.scaled_dot_product_attention(q, k, v, **more)
            found.append(mixed.transpose(1, 2).flatten(2))
        return self.leave(torch.cat(found, -1))


def test_masks_order_and_groups(tmp_path: Path) -> None:
    """Each in the engine, and each in the network what it is in the program."""
    torch.manual_seed(2)
    seen, added = torch.rand(1, 1, 64, 64) < 0.8, torch.randn(1, 4, 64, 64)
    inputs = {"x": torch.randn(1, 64, 8), "seen": seen, "added": added}
    inputs = {name: x if x.dtype == torch.bool else x.bfloat16() for name, x in inputs.items()}
    module = sharpened(Kinds()).bfloat16()
    program, _ = trace(module, inputs, {})
    plain = decompose(program, table())
    nodes, kept = attention8.choose(plain)
    assert (len(nodes), kept) == (4, ())
    steps = {n.name: (0.01, 0.02, 0.03) for n in nodes}
    dense, axis = attention8.over_codes(plain, steps), axis_of(1)
    split = shard(dense, axis)
    done, outcomes = rewrite(split, strategy("ulysses", 1), "ulysses", axis, table())
    lowered = lower(done)
    build(specialise(lowered, 0), 0, tmp_path / "engine", ["8.9", "12.0"])
    found = read_plan(tmp_path / "engine").attentions()
    assert [one.count(FP8) for one in found] == 4 * [3]
    sites = [(o.site, o.node) for o in outcomes]
    proof = prove(
        measure(module, inputs),
        inputs,
        Stages(dense, done, done, lowered, sites, axis, dense, plain),
    )
    flat = flat_inputs(lowered, inputs)
    networks = prove_networks(networks_of(lowered, 1), flat, proof, lowered)
    assert max(e.max for e in (*proof.algebra, *networks.algebra)) < 1e-5
    assert proof.codes is not None
    assert all(e.within(proof.codes.bound) for e in (*proof.codes.ranks, *networks.codes))


def test_a_single_head_multiplies_codes_all_the_same(tmp_path: Path) -> None:
    """The builder fuses no attention of one head over few tokens, whatever it reads."""
    plan = built("ulysses", 4, tmp_path / "engine", torch.bfloat16, heads=4, width=128)
    assert plan.attentions() == [(FP8, FP8, FP8)]  # over the text, by all heads
    assert plan.products().count((FP8, FP8)) == 2


def wider(model: str) -> str:
    """With heads of 32 numbers."""
    for old, new in (
        ("attention_head_dim=16", "attention_head_dim=32"),
        ("attention_head_dim=24", "attention_head_dim=32"),
        ("(4, 6, 6)", "(8, 12, 12)"),
        ("axes_dims_rope=(4, 4, 4, 4)", "axes_dims_rope=(8, 8, 8, 8)"),
        ("text=7,", "text=40,"),
    ):
        model = model.replace(old, new)
    return model


def test_a_checkpoint_with_quantized_attention_is_taken_as_it_is(tmp_path: Path) -> None:
    """From the file to two processes."""
    model, space = wider(FLUX), dict[str, Any]()
    exec(model, space)
    module: nn.Module = space["build_model"]()
    paths = ["transformer_blocks.0.attn", "single_transformer_blocks.0.attn"]
    tensors = with_attention(tensors_of(module, layers_of(module)), paths)
    weights = write(tmp_path / "weights", tensors)
    manifest, plan = converted(
        tmp_path, model, weights=weights, compute_capabilities=("8.9", "12.0"), proof="network"
    )
    assert plan.attentions() == 2 * [(FP8, FP8, FP8)]
    assert plan.products().count((FP8, FP8)) == 17
    check_proof(manifest)
    told = manifest.quantization
    assert told is not None
    assert told.attentions is not None
    assert told.attentions.products == {"fp8": 2}
    stored = load_file(weights / FILE)
    for one in told.attentions.layers:
        amax = [stored[f"{one.module}.{letter}_bmm_quantizer._amax"].item() for letter in "qkv"]
        scales = [one.query_scale, one.key_scale, one.value_scale]
        assert scales == [largest / 448 for largest in amax]
        assert one.loss is not None
        assert (one.given, 1e-3 < one.loss < 0.3) == ("both", True)
    assert [one.codes for one in manifest.attention] == ["fp8", "fp8"]
    check_run(tmp_path / "out", *dense_of(tmp_path / "flux.py"))


@pytest.mark.slow
def test_own_scales_beside_an_exchange_in_8_bits(tmp_path: Path) -> None:
    manifest, plan = converted(
        tmp_path, wider(FLUX), quantize="fp8", attention="fp8", exchange="int8:qkvo",
        keep=("single_transformer_blocks.0.attn",), proof="network", layout="shared",
    )  # fmt: skip
    assert sorted(plan.attentions()) == [HALF, (FP8, FP8, FP8)]
    assert plan.sent("all_to_all").count("int8") == 4
    check_proof(manifest)
    assert manifest.quantization is not None
    told = manifest.quantization.attentions
    assert told is not None
    assert (told.products, told.sets) == ({"fp8": 1, "bf16": 1}, 1)
    assert [(one.module, one.reason) for one in told.kept] == [
        ("single_transformer_blocks.0.attn", "--keep")
    ]
    assert [one.codes for one in manifest.attention] == ["fp8", None]


MODELS = {"wan": (WAN, 2), "qwen": (QWEN, 1), "flux2": (FLUX2, 2)}


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_other_models(model: str, tmp_path: Path) -> None:
    """Wan's attention to a text, Qwen-Image's masks, FLUX.2's parallel blocks."""
    text, count = MODELS[model]
    manifest, plan = converted(
        tmp_path, wider(text), quantize="fp8", attention="fp8", strategy="allgather-kv",
        proof="network", compute_capabilities=("8.9", "12.0"),
    )  # fmt: skip
    found = plan.attentions()
    assert [one.count(FP8) for one in found] == count * [3]
    check_proof(manifest)
    assert manifest.quantization is not None
    assert manifest.quantization.attentions is not None
    assert manifest.quantization.attentions.products == {"fp8": count}


@pytest.mark.parametrize(
    ("kind", "codes", "targets"),
    [
        ("nvfp4", "fp4_e2m1", ("12.0",)),
        pytest.param("int8", "int8", ("8.9", "12.0"), marks=SLOW),
    ],
)
def test_beside_linear_layers_in_other_codes(
    kind: str, codes: str, targets: tuple[str, ...], tmp_path: Path
) -> None:
    """From a checkpoint, each by its own type; the engine is for GPUs that have both."""
    space = dict[str, Any]()
    exec(wider(WAN), space)
    module: nn.Module = space["build_model"]()
    layers = [one for one in layers_of(module) if "blocks.0" in one]
    made = in_nvfp4 if kind == "nvfp4" else smoothed
    paths = [n for n, _ in module.named_modules() if n.endswith((".attn1", ".attn2"))]
    tensors = with_attention(made(module, layers), paths)
    algorithm = {"nvfp4": "NVFP4", "int8": "W8A8_SQ_PER_CHANNEL"}[kind]
    manifest, plan = converted(
        tmp_path, wider(WAN), weights=write(tmp_path / "weights", tensors, algorithm),
        proof="network", compute_capabilities=targets,
    )  # fmt: skip
    assert [one.count(FP8) for one in plan.attentions()] == len(paths) * [3]
    assert plan.products().count((codes, codes)) == len(layers)
    assert {one for one in plan.products() if FP8 in one} == set()
    assert manifest.runs_on.compute_capabilities == list(targets)
    check_proof(manifest)
    told = manifest.quantization
    assert told is not None and told.linears is not None and told.attentions is not None
    assert told.linears.products[kind] == len(layers)
    assert told.attentions.products == {"fp8": len(paths)}
