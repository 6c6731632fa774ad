"""A tensor that is known when somebody looks: shape and type come in, numbers when they are there.

A pipeline calls the model once a guidance branch and combines the results after the last call. What
the first call returns is a promise, so that the ranks can compute all branches at once. Source:
torch's *Extending PyTorch* (wrapper subclasses, ``__torch_dispatch__``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten: Final = torch.ops.aten
Find = Callable[[], Tensor]
_LATER: Final = (
    aten.slice.Tensor, aten.select.int, aten.view.default, aten._unsafe_view.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int,
    aten._to_copy.default, aten.detach.default, aten.alias.default, aten.clone.default,
)  # fmt: skip
"""What pipelines do with a branch's result before the next call: done when it is there."""


class Promised(Tensor):
    """A tensor whose numbers ``find`` returns, at the first operator that needs them."""

    _find: Find
    _value: Tensor | None
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, find: Find
    ) -> Promised:
        """A promise of a tensor of this kind."""
        made: Promised = torch.Tensor._make_wrapper_subclass(
            cls, tuple(sizes), dtype=dtype, device=device
        )
        made._find, made._value = find, None
        return made

    def value(self) -> Tensor:
        """The tensor itself."""
        if self._value is None:
            self._value = self._find()
        return self._value

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # it is given the operator first
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Put off what only looks at the promise in another way; do everything else."""
        kwargs = kwargs or {}
        if func in _LATER and args[0]._value is None:
            return _later(func, *args, **kwargs)
        args, kwargs = kept((args, kwargs))
        return func(*args, **kwargs)


def _later(func: Any, promise: Promised, *args: Any, **kwargs: Any) -> Promised:
    meta = torch.empty(promise.shape, dtype=promise.dtype, device="meta")
    like = func(meta, *args, **{**kwargs, **({"device": "meta"} if "device" in kwargs else {})})
    device = torch.device(kwargs.get("device") or promise.device)
    return Promised(like.shape, like.dtype, device, lambda: func(promise.value(), *args, **kwargs))


def kept(tree: Any) -> Any:
    """``tree`` with tensors in the places of promises."""
    return pytree.tree_map_only(Promised, Promised.value, tree)
