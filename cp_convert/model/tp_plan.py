"""Which matrices a model's own plan has ranks share: the vocabulary of a ``tp_plan``.

A dict by module names comes in, what it says of every weight goes out. The words are those of
diffusers' ``_tp_plan``; a model file without diffusers imports the packed ones from
``cp_convert``::

    tp_plan = {
        "blocks.*.attn.to_q": "colwise",
        "blocks.*.attn.to_out.0": "rowwise",
        "blocks.*.mlp.gate_up": PackedColwiseParallel([1, 1]),
    }

``colwise`` gives every rank some of a matrix's outputs, ``rowwise`` some of its inputs, whose sums
are reduced; packed, each of its blocks is shared by itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from torch import Tensor, nn

from ..errors import CannotShard
from ..ir.shares import Declared
from ..job import Job
from ..mesh import TENSOR
from .plan import modules_of

_DIMS: Final = {"colwise": 0, "rowwise": 1}
_WORDS: Final = {
    "ColwiseParallel": "colwise",
    "RowwiseParallel": "rowwise",
    "PackedColwiseParallel": "colwise",
    "PackedRowwiseParallel": "rowwise",
}
"""Classes of diffusers, of torch and of this file, by name."""


def taken(given: Mapping[str, Any], module: nn.Module, job: Job) -> dict[str, Declared]:
    """The plan that counts: the model file's, ``given``, or where that is asked its class's.

    A class's own ``_tp_plan`` names nothing that is not found, and less (no modulation).

    Raises:
        CannotShard: there is none where it is asked for, or it does not fit the model.
    """
    if (job.tp == 1 and TENSOR not in job.open_axes) or job.tp_plan == "auto":
        return {}
    own = getattr(module, "_tp_plan", None) if job.tp_plan == "model" else None
    plan = given or own or {}
    if not plan and job.tp_plan == "model":
        raise CannotShard(
            f"{type(module).__name__} has no plan of weights: neither {job.model.name} defines "
            "tp_plan nor the model a _tp_plan.",
            where=str(job.model),
            hint="leave --tp-plan out, and all weights are shared that can be.",
        )
    return declared(plan, module)


def declared(plan: Mapping[str, Any], module: nn.Module) -> dict[str, Declared]:
    """What ``plan`` says of the weights of ``module``, by their names.

    Lines for blocks that a shallower model of the same class lacks are left out.

    Raises:
        CannotShard: a module that does not exist or has no matrix, or a word that is not known.
    """
    modules = dict(module.named_modules())
    found: dict[str, Declared] = {}
    for pattern, style in plan.items():
        for name in modules_of(pattern, list(modules), "tp_plan"):
            found[f"{name}.weight"] = _one(name, modules[name], style, f"tp_plan[{pattern!r}]")
    return found


def _one(name: str, module: nn.Module, style: Any, line: str) -> Declared:
    word = style if isinstance(style, str) else _WORDS.get(type(style).__name__)
    if word not in _DIMS:
        raise CannotShard(
            f"the plan says {style!r} of {name}, which is no way to split a matrix.",
            where=line,
            hint="'colwise', 'rowwise', PackedColwiseParallel and PackedRowwiseParallel (of "
            "cp_convert or diffusers) are.",
        )
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise CannotShard(
            f"the plan names {name}, a {type(module).__name__}, which has no matrix to split.",
            where=line,
            hint="it names linear layers.",
        )
    dim = _DIMS[word]
    length = weight.shape[dim]
    if not type(style).__name__.startswith("Packed"):
        return Declared(name, line, dim, (length,))
    attribute = f"_tp_packed_{'col' if dim == 0 else 'row'}_blocks"
    blocks = list(style.blocks or getattr(module, attribute, None) or [])
    if not blocks or length % sum(blocks):
        raise CannotShard(
            f"the plan packs {name} in blocks of {blocks or 'no length'}, which do not make up its "
            f"{length} {'outputs' if dim == 0 else 'inputs'}.",
            where=line,
            hint=f"lengths in proportion, such as [1, 1]; or {attribute} of the module.",
        )
    return Declared(name, line, dim, tuple(n * length // sum(blocks) for n in blocks))
