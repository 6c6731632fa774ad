"""Quantized blocks that share an engine: what is multiplied, and which scales it is given."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from benchmarks.checkpoints.modelopt import (
    in_nvfp4,
    mixed,
    said,
    smoothed,
    tensors_of,
    with_attention,
    write,
)
from benchmarks.plans import Plan, read_plan
from cp_convert.bundle.manifest import Manifest
from cp_convert.bundle.parts import kinds_of
from cp_convert.errors import ProofFailed
from cp_convert.prove import network
from tests.engine.test_attention8 import wider
from tests.engine.test_quantized import check_proof, converted
from tests.engine.test_quantized_models import FLUX2, layers_of
from tests.runtime.bundles import FLUX, QWEN, WAN

pytestmark = pytest.mark.engine
SLOW = pytest.mark.slow
FP8, FP4 = "fp8_e4m3", "fp4_e2m1"
DEEP_WAN = WAN.replace("num_layers=1", "num_layers=3")
DEEP_FLUX = FLUX.replace("num_layers=1, num_single_layers=1", "num_layers=2, num_single_layers=3")


def by_kinds(tmp_path: Path, model: str, **options: Any) -> tuple[Manifest, dict[int, Plan]]:
    """The conversion by kinds of blocks, and rank 0's engines by the first piece they serve."""
    manifest, _ = converted(tmp_path, model, **{"layout": "blocks", "proof": "network", **options})
    first = {e.piece: e.file for e in manifest.engines if e.rank == 0 and e.piece is not None}
    return manifest, {piece: read_plan(tmp_path / "out" / file) for piece, file in first.items()}


def test_equal_blocks_multiply_codes_in_one_engine(tmp_path: Path) -> None:
    manifest, plans = by_kinds(tmp_path, DEEP_WAN, quantize="fp8", strategy="ring")
    # The first block is handed float32 by what leads to it. The text, which all read, becomes codes
    # in each, as an engine that is handed what codes stand for multiplies that.
    assert kinds_of(manifest) == [0, 1, 2, 2, 4]
    for piece in (1, 2):
        products = Counter(plans[piece].products())
        assert products[FP8, FP8] == 10
        assert all(len(set(one)) == 1 for one in products)
    assert manifest.quantization is not None
    assert manifest.quantization.linears is not None
    assert manifest.quantization.linears.products["fp8"] == 30
    check_proof(manifest)


@SLOW
def test_the_networks_are_given_every_piece_own_scales(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replay = network.replay_pieces

    def mistaken(*args: Any, names: Sequence[dict[str, str]], **options: Any) -> list[list[Tensor]]:
        other = dict(names[3])
        one, two = (f"constants.blocks.1.{x}.scale" for x in ("attn1.to_v", "ffn.net.2"))
        other[one], other[two] = other[two], other[one]
        return replay(*args, names=[*names[:3], other, *names[4:]], **options)

    monkeypatch.setattr(network, "replay_pieces", mistaken)
    with pytest.raises(ProofFailed, match="the networks go astray"):
        by_kinds(tmp_path, DEEP_WAN, quantize="fp8", strategy="ring")


@SLOW
@pytest.mark.parametrize(
    ("model", "options", "pair"),
    [
        (DEEP_FLUX, {"quantize": "int8", "strategy": "allgather-kv"}, "int8"),
        (DEEP_FLUX, {"quantize": "nvfp4", "compute_capabilities": ("12.0",)}, FP4),
        (wider(DEEP_FLUX), {"quantize": "fp8", "attention": "fp8"}, FP8),
        (QWEN.replace("num_layers=1", "num_layers=3"), {"quantize": "int8", "world": 4}, "int8"),
        (FLUX2.replace("layers=1", "layers=3"), {"quantize": "fp8", "world": 4}, FP8),
    ],
    ids=["int8", "nvfp4", "attention", "qwen", "flux2"],
)
def test_other_models_and_codes(
    model: str, options: dict[str, Any], pair: str, tmp_path: Path
) -> None:
    manifest, plans = by_kinds(tmp_path, model, **options)
    check_shared(manifest, plans, pair)
    check_proof(manifest, options.get("world", 2))


def check_shared(manifest: Manifest, plans: dict[int, Plan], pair: str) -> None:
    """Some engine serves several pieces; what they multiply is codes, as often as is told."""
    kinds = kinds_of(manifest)
    assert len(plans) < len(kinds)
    count = sum(plans[kind].products().count((pair, pair)) for kind in kinds)
    assert manifest.quantization is not None
    told = manifest.quantization
    assert told.linears is not None
    assert count == len(told.linears.layers)
    if told.attentions is not None:
        of_codes = [plans[kind].attentions().count((FP8, FP8, FP8)) for kind in kinds]
        assert sum(of_codes) == told.attentions.products["fp8"]


@SLOW
@pytest.mark.parametrize("kind", ["FP8", "W8A8_SQ_PER_CHANNEL", "NVFP4_SVD"])
def test_checkpoints_with_scales(kind: str, tmp_path: Path) -> None:
    space, model = dict[str, Any](), wider(DEEP_FLUX)
    exec(model, space)
    module = space["build_model"]()
    layers = layers_of(module)
    paths = [name for name, _ in module.named_modules() if name.endswith(".attn")]
    tensors = {
        "FP8": lambda: with_attention(tensors_of(module, layers), paths),
        "W8A8_SQ_PER_CHANNEL": lambda: smoothed(module, layers),
        "NVFP4_SVD": lambda: in_nvfp4(module, layers, 8),
    }[kind]()
    targets = ("12.0",) if "4" in kind else ("8.9", "12.0")
    manifest, plans = by_kinds(
        tmp_path, model, weights=write(tmp_path / "weights", tensors, kind),
        compute_capabilities=targets, precision="fp16" if "W8" in kind else "bf16",
    )  # fmt: skip
    pair = {"F": FP8, "W": "int8", "N": FP4}[kind[0]]
    check_shared(manifest, plans, pair)
    check_proof(manifest)


@SLOW
def test_a_checkpoint_of_several_kinds(tmp_path: Path) -> None:
    """FP8 with factors, INT8 and NVFP4 with a low rank in each block, and blocks share engines."""
    space, model = dict[str, Any](), wider(DEEP_FLUX)
    exec(model, space)
    module = space["build_model"]()
    kinds = {layer: kind_of(layer) for layer in layers_of(module)}
    weights = write(
        tmp_path / "weights", mixed(module, kinds, smooth=True), layers=said(kinds)
    )  # fmt: skip
    manifest, plans = by_kinds(tmp_path, model, weights=weights, compute_capabilities=("12.0",))
    assert manifest.quantization is not None
    linears = manifest.quantization.linears
    assert linears is not None
    count = Counter(kinds.values())
    assert (linears.products["fp8"], linears.products["int8"], linears.products["nvfp4"]) == (
        count["FP8"], count["W8A8_SQ_PER_CHANNEL"], count["NVFP4_SVD"]
    )  # fmt: skip
    shared = Counter(kinds_of(manifest))
    assert max(shared.values()) > 1
    for piece in (one for one, times in shared.items() if times > 1):
        products = Counter(plans[piece].products())
        assert min(products[one, one] for one in (FP8, FP4, "int8")) > 0
        assert all(len(set(one)) == 1 for one in products)
    check_proof(manifest)


def kind_of(layer: str) -> str:
    """Of a layer of FLUX's blocks."""
    if ".ff" in layer or "proj_mlp" in layer:
        return "NVFP4_SVD"
    return "W8A8_SQ_PER_CHANNEL" if "out" in layer else "FP8"
