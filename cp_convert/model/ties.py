"""Which names of a model share memory: tied parameters, and views of one another."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import WeightsError


@dataclass(frozen=True)
class Strided:
    """How a tensor lies in its storage, in numbers."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def of(self, storage: Tensor) -> Tensor:
        """The same place in ``storage``, which has one dimension."""
        return storage.as_strided(self.shape, self.stride, self.offset)


@dataclass(frozen=True)
class Ties:
    """Names of a state dict that share memory, as the model was built.

    Attributes:
        same: by name, all names of the very same tensor, itself included.
        views: for every storage with more than one name, how each lies in it.
    """

    same: Mapping[str, tuple[str, ...]]
    views: tuple[Mapping[str, Strided], ...]

    @staticmethod
    def of(module: nn.Module) -> Ties:
        """Of a model that is not cast yet: casting takes views apart."""
        state = module.state_dict(keep_vars=True)
        same: dict[int, list[str]] = {}
        views: dict[int, dict[str, Strided]] = {}
        for name, tensor in state.items():
            same.setdefault(id(tensor), []).append(name)
            if tensor.layout == torch.strided:
                lies = Strided(tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
                views.setdefault(tensor.untyped_storage()._cdata, {})[name] = lies
        return Ties(
            {name: tuple(names) for names in same.values() for name in names},
            tuple(names for names in views.values() if len(names) > 1),
        )

    def present(self, name: str, names: Collection[str]) -> str | None:
        """``name`` or one that is tied to it, among ``names``."""
        return next((n for n in (name, *self.same.get(name, ())) if n in names), None)

    def check_agreement(
        self, names: Collection[str], read: Callable[[str], Tensor], told: Callable[[str], str]
    ) -> None:
        """What shares memory has the same numbers in the files, wherever both are there.

        Args:
            names: those that the files hold.
            read: their numbers.
            told: where they come from, in words.

        Raises:
            WeightsError: two names disagree.
        """
        for group in self.views:
            here = {name: lies for name, lies in group.items() if name in names}
            if len(here) > 1:
                _check(here, read, told)


def _check(
    group: Mapping[str, Strided], read: Callable[[str], Tensor], told: Callable[[str], str]
) -> None:
    """Write all into one piece of memory, as the model would, and see what is left of each."""
    dtype = torch.float32
    for name in group:
        dtype = torch.promote_types(dtype, read(name).dtype)
    size = max(lies.offset + _extent(lies) for lies in group.values())
    storage = torch.zeros(size, dtype=dtype)
    for name, lies in group.items():
        lies.of(storage).copy_(read(name))
    last = list(group)[-1]
    for name, lies in group.items():
        # NaN differs from itself; it is named by the check for it.
        if not torch.allclose(lies.of(storage), read(name).to(dtype), 0, 0, equal_nan=True):
            raise WeightsError(
                f"{name} ({told(name)}) and {last} ({told(last)}) are one piece of memory in the "
                "model, and their numbers differ.",
                hint="the file belongs to a model in which they are not tied; build that one, or "
                "leave the name that does not count out of the file.",
            )


def _extent(lies: Strided) -> int:
    return 1 + sum((n - 1) * s for n, s in zip(lies.shape, lies.stride, strict=True))
