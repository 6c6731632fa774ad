"""Which precision a model is converted in, and its parameters and inputs cast to it."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import UsageError
from ..job import RESIDUAL, USUAL_PRECISION, without_bf16

DTYPES: Final = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
_NAMES: Final = {dtype: name for name, dtype in DTYPES.items()}
_CASTABLE: Final = (torch.float16, torch.bfloat16, torch.float32)
_HALF: Final = (torch.float16, torch.bfloat16)
Sized = tuple[torch.dtype | None, int]
"""A tensor's type and its size in bytes."""


def usual_precision(
    known: str | None,
    modules: Iterable[nn.Module],
    stored: Iterable[Sized],
    compute_capabilities: Collection[str],
) -> str:
    """The precision of a job that names none; docs/adr/0015 tells why.

    The preset's; else the half type that most numbers of the module are in as it was built; else
    that of most numbers in the checkpoint; else bf16: float32 is what a module is built in and a
    checkpoint is trained in, and says nothing about how it is served. Where a GPU that is built for
    has no bf16, fp16 takes its place.

    Args:
        known: the preset's.
        modules: the model (every rank's).
        stored: of every tensor in the checkpoint.
        compute_capabilities: that are built for.
    """
    held = ((p.dtype, p.numel()) for module in modules for p in module.parameters())
    found = known or _most(held) or _most(stored) or USUAL_PRECISION
    return "fp16" if found == "bf16" and without_bf16(compute_capabilities) else found


def _most(tensors: Iterable[Sized]) -> str | None:
    sizes = dict.fromkeys(_HALF, 0)
    for dtype, size in tensors:
        if dtype in sizes:
            sizes[dtype] += size
    most = max(_HALF, key=sizes.__getitem__)
    return _NAMES[most] if sizes[most] else None


def cast_module(module: nn.Module, dtype: torch.dtype, float32: Collection[str] = ()) -> None:
    """Cast parameters and persistent buffers to ``dtype``, in place.

    Left as they are: integers, float64, buffers that are not part of the state dict (tables that
    the model computes, such as rotary frequencies), and what diffusers keeps in float32
    (``_keep_in_fp32_modules``); loading a published checkpoint treats them in the same way.

    Args:
        module: the model.
        dtype: of the job.
        float32: patterns of module paths, as a shell's; ``*`` stands for dots too. What they name
            is kept in float32, and computes in it: see :func:`_bound`.

    Raises:
        UsageError: a pattern that names no module.
    """
    kept = tuple(getattr(module, "_keep_in_fp32_modules", None) or ())
    wide = _outermost(module, float32) if dtype in _HALF else []
    widely = {
        id(t)
        for path in wide
        for t in module.get_submodule(path).state_dict(keep_vars=True).values()
    }
    persistent = set(module.state_dict(keep_vars=True))

    def wanted(name: str, tensor: Tensor) -> torch.dtype:
        if name not in persistent or tensor.dtype not in _CASTABLE:
            return tensor.dtype
        is_wide = _is_kept(name, kept) or id(tensor) in widely
        return torch.float32 if is_wide else dtype

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.data = parameter.data.to(wanted(name, parameter))
        for prefix, owner in module.named_modules():
            for name, buffer in list(owner.named_buffers(recurse=False)):
                path = f"{prefix}.{name}" if prefix else name
                # Not through .data: a buffer may be a view, whose base would keep its dtype.
                setattr(owner, name, buffer.to(wanted(path, buffer)))
    for path in wide:
        _bound(module, path)


def _is_kept(name: str, kept: Collection[str]) -> bool:
    return any(part in kept for part in name.split("."))


def _is_within(name: str, paths: Collection[str]) -> bool:
    return any(name.startswith(f"{path}.") for path in paths)


def _outermost(module: nn.Module, patterns: Collection[str]) -> list[str]:
    """Paths of the modules that match, without those inside of another."""
    paths = [path for path, _ in module.named_modules() if path]
    found: list[str] = []
    for pattern in patterns:
        matching = [path for path in paths if fnmatchcase(path, pattern)]
        if not matching and pattern != RESIDUAL:
            near = difflib.get_close_matches(pattern, paths, 1)
            raise UsageError(
                f"--float32 {pattern}: {type(module).__name__} has no module of such a path.",
                hint=f"did you mean {near[0]}?"
                if near
                else f"its modules are {', '.join(paths[:6])} ...; * stands for any characters.",
            )
        found += matching
    return [p for p in dict.fromkeys(found) if not _is_within(p, set(found) - {p})]


def _bound(root: nn.Module, path: str) -> None:
    """Let the module at ``path`` be given float32, and return what the others compute in.

    Half-precision arguments are cast up at its boundary. Floating results are cast down to the
    type of a parameter outside; to none, that is, while the whole model is in float32 for the
    proof's reference.
    """
    # By name: the parameter itself may be replaced when weights are read.
    outside = next((name for name, p in root.named_parameters() if p.dtype in _HALF), None)

    def up(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        return pytree.tree_map(_up, args), pytree.tree_map(_up, kwargs)

    def down(_: nn.Module, args: Any, output: Any) -> Any:
        dtype = None if outside is None else root.get_parameter(outside).dtype
        return output if dtype not in _HALF else pytree.tree_map(lambda x: _to(x, dtype), output)

    module = root.get_submodule(path)
    module.register_forward_pre_hook(up, with_kwargs=True)
    module.register_forward_hook(down)


def _up(leaf: Any) -> Any:
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in _HALF else leaf


def _to(leaf: Any, dtype: torch.dtype) -> Any:
    return leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf


def cast_inputs(
    inputs: Mapping[str, Any], dtype: torch.dtype, *, keep: Collection[str] = ()
) -> dict[str, Any]:
    """Cast floating tensors of at most 32 bits to ``dtype``, except the arguments in ``keep``."""

    def cast(leaf: Any) -> Any:
        castable = isinstance(leaf, Tensor) and leaf.dtype in _CASTABLE
        return leaf.to(dtype) if castable else leaf

    return {
        name: value if name in keep else pytree.tree_map(cast, value)
        for name, value in inputs.items()
    }
