"""Weights that stay codes while nobody computes with the numbers that they stand for.

In: a job, and which stored weights are codes. Out: whether their numbers are wanted, and what
stands for them if not: a tensor without memory, which nothing can be computed from by mistake.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..ir.nvfp4 import LARGEST_NUMBER
from ..ir.source import Codes
from ..job import ATTENTION_FP8, Job
from .coded import Coded, shape_of
from .formats import FLOAT8


def are_unread(job: Job, coded: Mapping[str, Coded]) -> bool:
    """Whether no stage of the job computes with the numbers of a checkpoint's codes.

    A proof does, and so does whoever measures what flows (``--quantize``, ``--attention fp8``) or
    takes the numbers in another type (``--allow-cast``).
    """
    is_cast = FLOAT8 in job.allow_cast
    is_measured = job.quantize is not None or job.attention == ATTENTION_FP8
    return bool(coded) and job.proof == "none" and not is_measured and not is_cast


def without_numbers(coded: Coded, codes: Tensor, like: Tensor) -> Tensor | None:
    """What stands for the numbers of ``codes`` in a model that has ``like`` in their place.

    Returns:
        ``None`` where numbers are wanted after all: tables, and what ``like``'s type may not hold.
    """
    most = torch.as_tensor(coded.weight_scale).max() * LARGEST_NUMBER[codes.dtype]
    if coded.low_rank is not None:
        down, up = (factor.float() for factor in coded.low_rank)
        most = most + len(down) * down.abs().max() * up.abs().max()
    if coded.smooth is not None:
        most = most * coded.smooth.max()
    if not isinstance(like, nn.Parameter) or float(most) > torch.finfo(like.dtype).max:
        return None
    return torch.empty(shape_of(tuple(codes.shape), coded), dtype=like.dtype, device="meta")


def read_numbers(held: Tensor, codes: Codes | None, dtype: torch.dtype) -> Tensor:
    """The numbers of one weight in ``dtype``: ``held``, or what its codes stand for after all."""
    if codes is None or not held.is_meta:
        return held.to(dtype)
    own = Coded(
        codes.weight_scale,
        None,
        smooth=codes.smooth,
        dtype=codes.codes.dtype,
        blocks=codes.blocks,
        low_rank=codes.low_rank,
    )
    return own.numbers(codes.codes, dtype)
