"""Bundles for the run-time's tests: all stages but TensorRT's build, whose engines nobody opens."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from cp_convert import stages
from cp_convert.backends import select
from cp_convert.bundle import engine_name, sha256
from cp_convert.bundle.folder import piece_folder
from cp_convert.bundle.manifest import Manifest
from cp_convert.ir.engine import Engine
from cp_convert.ir.records import Built
from cp_convert.job import Job
from cp_convert.pipeline import convert
from cp_convert.progress import Progress


def _stand_ins(loaded: Any, emitted: Any, *_: Any) -> Built:
    engines = []
    pieces = [None] if emitted.pieces is None else emitted.kinds
    for piece, rank in product(pieces, range(loaded.job.world)):
        path = loaded.folder / loaded.within / piece_folder(piece) / engine_name(rank)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"engine of rank %d" % rank)
        size, digest = path.stat().st_size, sha256(path)
        engines.append(Engine(rank, path, size, digest, (), 0.0, activations=1024, piece=piece))
    return Built(tuple(engines), {})


@contextmanager
def stand_ins() -> Iterator[None]:
    """Conversions build no engines; files of a few bytes stand in their places."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stages, "_built", _stand_ins)
        yield


def converted(model: Path, out: Path, strategy: str, world: int, **options: Any) -> Manifest:
    """A bundle of ``model`` in float32 at ``out``."""
    usual: dict[str, Any] = {"precision": "fp32", "proof": "none", "program": "yes"}
    job = Job(
        model=model, out=out, strategy=strategy, world=world, command="cp-convert",
        **usual | options,
    )  # fmt: skip
    with stand_ins():
        return convert(job, select("auto"), Progress())


FLUX = """
import torch
from diffusers import FluxTransformer2DModel

def build_model():
    torch.manual_seed(0)
    return FluxTransformer2DModel(in_channels=16, num_layers=1, num_single_layers=1,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6))

def example_inputs(rows=6, columns=8, text=12, batch=1):
    torch.manual_seed(1)
    many = torch.arange(rows * columns)
    ids = torch.stack((torch.zeros(len(many)), many // columns, many % columns), -1)
    return {"hidden_states": torch.randn(batch, len(many), 16),
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "pooled_projections": torch.randn(batch, 16), "timestep": torch.full((batch,), 0.5),
        "img_ids": ids.float(), "txt_ids": torch.zeros(text, 3),
        "guidance": torch.full((batch,), 3.5)}
"""
WAN = """
import torch
from diffusers import WanTransformer3DModel

def build_model():
    torch.manual_seed(0)
    return WanTransformer3DModel(patch_size=(1, 2, 2), num_attention_heads=4,
        attention_head_dim=24, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=64,
        num_layers=1, rope_max_seq_len=16)

def example_inputs(frames=3, rows=8, columns=8, text=7, batch=1):
    torch.manual_seed(1)
    return {"hidden_states": torch.randn(batch, 4, frames, rows, columns),
        "timestep": torch.full((batch,), 500),
        "encoder_hidden_states": torch.randn(batch, text, 16)}
"""
QWEN = """
import torch
from diffusers import QwenImageTransformer2DModel

def build_model():
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(in_channels=16, out_channels=4, num_layers=1,
        attention_head_dim=16, num_attention_heads=4, joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6))

def example_inputs(rows=6, columns=8, text=12, batch=1):
    torch.manual_seed(1)
    mask = torch.ones(batch, text, dtype=torch.bool)
    return {"hidden_states": torch.randn(batch, rows * columns, 16),
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "timestep": torch.full((batch,), 0.5), "img_shapes": [(1, rows, columns)] * batch,
        "encoder_hidden_states_mask": mask}
"""
