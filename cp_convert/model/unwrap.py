"""A model as it was written: without what compiles it, copies it to devices or casts its layers.

``torch.compile``, ``module.compile()``, ``DataParallel`` and diffusers' layerwise casting change
where and how fast a forward is computed, not what it computes; a program is made of what is inside.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import nn

_CASTING: Final = "layerwise_casting"
_WITH_CASTING: Final = ("peft_autocast_disable", _CASTING)


def unwrapped(module: nn.Module) -> nn.Module:
    """``module`` without wrappers, its parts too; it is changed in place.

    Weights that diffusers' layerwise casting holds in a small type are given the type that forward
    computes in, with the values that they were rounded to.
    """
    module = _inside(module)
    for part in list(module.modules()):
        for name, child in part.named_children():
            part._modules[name] = _inside(child)
    for part in module.modules():
        vars(part).pop("_compiled_call_impl", None)
        _undo_compiled_forward(part)
        _undo_casting(part)
    return module


def _inside(module: nn.Module) -> nn.Module:
    while True:
        if isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner  # torch.compile(module)
        else:
            return module


def _undo_compiled_forward(module: nn.Module) -> None:
    """``module.forward = torch.compile(module.forward)``."""
    original = getattr(vars(module).get("forward"), "_torchdynamo_orig_callable", None)
    if original is not None:
        module.forward = original


def _undo_casting(module: nn.Module) -> None:
    registry: Any = getattr(module, "_diffusers_hook", None)
    hook = None if registry is None else registry.hooks.get(_CASTING)
    if hook is None:
        return
    # diffusers refuses, since the precision is gone; what Python computes lacks it as well.
    hook.deinitalize_hook = lambda module: module.to(dtype=hook.compute_dtype)
    for name in _WITH_CASTING:
        registry.remove_hook(name, recurse=False)


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled functions, which forward may call, are run as they were written."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled; importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
