"""Tensors of small models under the names of the models' authors, joined as they join them."""

from types import FunctionType
from typing import Any, Protocol

import torch
from torch import Tensor, nn


def original_flux(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a FLUX.1 with one block of each kind, named and joined as BFL does."""
    own = {name: t.detach().bfloat16() for name, t in module.state_dict().items()}
    named = {}
    for kind in ("weight", "bias"):

        def joined(*layers: str, k: str = kind) -> Tensor:
            return torch.cat([own[f"{layer}.{k}"] for layer in layers])

        double, single = "transformer_blocks.0", "single_transformer_blocks.0"
        scale, shift = own[f"norm_out.linear.{kind}"].chunk(2)
        found = {
            "img_in": joined("x_embedder"),
            "txt_in": joined("context_embedder"),
            "final_layer.linear": joined("proj_out"),
            "final_layer.adaLN_modulation.1": torch.cat([shift, scale]),
            "double_blocks.0.img_mod.lin": joined(f"{double}.norm1.linear"),
            "double_blocks.0.txt_mod.lin": joined(f"{double}.norm1_context.linear"),
            "double_blocks.0.img_attn.qkv": joined(*(f"{double}.attn.to_{x}" for x in "qkv")),
            "double_blocks.0.txt_attn.qkv": joined(*(f"{double}.attn.add_{x}_proj" for x in "qkv")),
            "double_blocks.0.img_attn.proj": joined(f"{double}.attn.to_out.0"),
            "double_blocks.0.txt_attn.proj": joined(f"{double}.attn.to_add_out"),
            "double_blocks.0.img_mlp.0": joined(f"{double}.ff.net.0.proj"),
            "double_blocks.0.img_mlp.2": joined(f"{double}.ff.net.2"),
            "double_blocks.0.txt_mlp.0": joined(f"{double}.ff_context.net.0.proj"),
            "double_blocks.0.txt_mlp.2": joined(f"{double}.ff_context.net.2"),
            "single_blocks.0.modulation.lin": joined(f"{single}.norm.linear"),
            "single_blocks.0.linear1": joined(
                *(f"{single}.attn.to_{x}" for x in "qkv"), f"{single}.proj_mlp"
            ),
            "single_blocks.0.linear2": joined(f"{single}.proj_out"),
        }
        for theirs, ours in (("time", "timestep"), ("vector", "text"), ("guidance", "guidance")):
            embedder = f"time_text_embed.{ours}_embedder"
            found[f"{theirs}_in.in_layer"] = joined(f"{embedder}.linear_1")
            found[f"{theirs}_in.out_layer"] = joined(f"{embedder}.linear_2")
        named |= {f"{layer}.{kind}": t for layer, t in found.items()}
    for theirs, ours in (
        ("double_blocks.0.img_attn", "transformer_blocks.0.attn.norm_"),
        ("double_blocks.0.txt_attn", "transformer_blocks.0.attn.norm_added_"),
        ("single_blocks.0", "single_transformer_blocks.0.attn.norm_"),
    ):
        named[f"{theirs}.norm.query_norm.scale"] = own[f"{ours}q.weight"]
        named[f"{theirs}.norm.key_norm.scale"] = own[f"{ours}k.weight"]
    return {name: t.contiguous() for name, t in named.items()}


_FLUX2 = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "single_transformer_blocks.0.attn.to_qkv_mlp_proj": "single_blocks.0.linear1",
    "single_transformer_blocks.0.attn.to_out": "single_blocks.0.linear2",
    "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
    "transformer_blocks.0.attn.to_add_out": "double_blocks.0.txt_attn.proj",
    "transformer_blocks.0.ff.linear_in": "double_blocks.0.img_mlp.0",
    "transformer_blocks.0.ff.linear_out": "double_blocks.0.img_mlp.2",
    "transformer_blocks.0.ff_context.linear_in": "double_blocks.0.txt_mlp.0",
    "transformer_blocks.0.ff_context.linear_out": "double_blocks.0.txt_mlp.2",
    "proj_out": "final_layer.linear",
}
"""Layers of FLUX.2 that have another name, and nothing else."""


def original_flux2(module: nn.Module) -> dict[str, Tensor]:
    """The same of a FLUX.2, whose single blocks are joined in diffusers, too."""
    own = {name: t.detach().bfloat16() for name, t in module.state_dict().items()}
    named = {f"{theirs}.weight": own.pop(f"{ours}.weight") for ours, theirs in _FLUX2.items()}
    double = "transformer_blocks.0.attn"
    for theirs, layers in (
        ("double_blocks.0.img_attn", [f"{double}.to_{x}" for x in "qkv"]),
        ("double_blocks.0.txt_attn", [f"{double}.add_{x}_proj" for x in "qkv"]),
    ):
        named[f"{theirs}.qkv.weight"] = torch.cat([own.pop(f"{x}.weight") for x in layers])
    for theirs, ours in (
        ("double_blocks.0.img_attn", f"{double}.norm_"),
        ("double_blocks.0.txt_attn", f"{double}.norm_added_"),
        ("single_blocks.0", "single_transformer_blocks.0.attn.norm_"),
    ):
        named[f"{theirs}.norm.query_norm.scale"] = own.pop(f"{ours}q.weight")
        named[f"{theirs}.norm.key_norm.scale"] = own.pop(f"{ours}k.weight")
    halves = own.pop("norm_out.linear.weight").chunk(2)
    named["final_layer.adaLN_modulation.1.weight"] = torch.cat(halves[::-1])
    assert not own
    return {name: t.contiguous() for name, t in named.items()}


FLUX_LAYERS = [
    *(f"double_blocks.0.{x}_{y}" for x in ("img", "txt") for y in ("attn.qkv", "attn.proj")),
    *(f"double_blocks.0.{x}_mlp.{y}" for x in ("img", "txt") for y in (0, 2)),
    *(f"single_blocks.0.linear{x}" for x in (1, 2)),
]
"""Those of the blocks, but for modulation."""


class Patch(Protocol):
    """Changes an item of a mapping; pytest's undoes it afterwards."""

    def setitem(self, mapping: Any, key: Any, value: Any, /) -> None:
        """The change."""


def smaller_flux(patch: Patch, inner: int) -> None:
    """Diffusers' mapping of FLUX.1 has its width written into it; here it has another."""
    from diffusers.loaders import single_file_model

    known = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["FluxTransformer2DModel"]
    own: Any = known["checkpoint_mapping_fn"]
    constants = tuple(inner if c == 3072 else c for c in own.__code__.co_consts)
    assert constants != own.__code__.co_consts
    code = own.__code__.replace(co_consts=constants)
    other = FunctionType(code, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    patch.setitem(known, "checkpoint_mapping_fn", other)


_WAN = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    ".norm2": ".normX",
    ".norm3": ".norm2",
    ".normX": ".norm3",
    "attn1": "self_attn",
    "attn2": "cross_attn",
    ".to_out.0.": ".o.",
    ".to_q.": ".q.",
    ".to_k.": ".k.",
    ".to_v.": ".v.",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
}
"""Parts of Wan's names that are others, one replaced after the other."""


def wan_name(name: str) -> str:
    """A name of diffusers' Wan as its authors have it."""
    for ours, theirs in _WAN.items():
        name = name.replace(ours, theirs)
    if name == "scale_shift_table":
        return "head.modulation"
    return name.replace("scale_shift_table", "modulation")


def original_wan(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a Wan of any size, which has its layers as diffusers does."""
    return {wan_name(name): tensor.clone() for name, tensor in module.state_dict().items()}
