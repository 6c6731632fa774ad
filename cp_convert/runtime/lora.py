"""LoRA sets of a bundle at work: what a rank binds instead of weights, the same on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..bundle.manifest import Manifest, Weight
from ..errors import ConvertError, RunFailed
from ..lora.base import Base
from ..lora.choose import Asked, changes_at, chosen, ready
from ..lora.compute import Changed
from ..lora.constants import changed_constants
from .groups import everyone
from .weights import bound_weights

Told = Callable[[str], None]


class Sets:
    """The sets of one bundle on one rank's device.

    Those that were used once stay there until the end, so that they are bound again in
    milliseconds; of what is computed at strengths of its own, the last.

    Args:
        manifest: of the bundle.
        folder: where it is.
        bound: the weights that the rank has, by name: those of the bundle itself.
        communicator: of all ranks, see :func:`.executors.open_rank`.
        verify: whether files are compared with the manifest's SHA-256.
        told: is called with every weight that was loaded.
    """

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        bound: Mapping[str, Tensor],
        communicator: Any,
        *,
        verify: bool,
        told: Told,
    ) -> None:
        self.manifest, self.folder, self.bound = manifest, folder, bound
        self._communicator, self._verify, self._told = communicator, verify, told
        self._kept: dict[str, dict[str, Tensor]] = {}
        self._computed: tuple[dict[str, float], dict[str, Tensor]] = ({}, {})

    def tensors(self, asked: Asked) -> dict[str, Tensor]:
        """What is to be bound instead of the bundle's own weights, by name; collective.

        Raises:
            UsageError: there is no such set, or sets that cannot be added.
            DamagedBundle: a file of the set is missing or altered.
            RunFailed: other ranks ask for other sets, or have others.
        """
        refusal, strengths, found = None, {}, {}
        try:
            strengths = chosen(self.manifest, asked)
            found = self._found(strengths)
        except ConvertError as error:
            refusal = error
        digests = [one.file.sha256 for one in self.manifest.lora if one.name in strengths]
        own = (strengths, digests, None if refusal is None else refusal.message)
        self._check_agreement(everyone(own, self._communicator), refusal)
        return found

    def close(self) -> None:
        """Free what is kept."""
        self.bound, self._kept, self._computed = {}, {}, ({}, {})

    def _check_agreement(
        self, ranks: list[tuple[Any, Any, str | None]], refusal: ConvertError | None
    ) -> None:
        """All ranks bind the same, or none does: one that went on alone would wait for ever."""
        if refusal is not None:
            raise refusal
        for rank, (strengths, digests, problem) in enumerate(ranks):
            if problem is not None:
                raise RunFailed(f"rank {rank} cannot use the LoRA that was asked for: {problem}")
            if (strengths, digests) != ranks[0][:2]:
                same = strengths == ranks[0][0]
                raise RunFailed(
                    f"rank {rank} "
                    + (
                        "has other numbers for"
                        if same
                        else f"asks for the LoRA {_said(strengths)}, and rank 0 for"
                    )
                    + f" {_said(ranks[0][0])}.",
                    hint="all ranks need the same bundle, and ask for the same sets.",
                )

    def _found(self, strengths: dict[str, float]) -> dict[str, Tensor]:
        if not strengths:
            return {}
        own = ready(self.manifest, strengths)
        if own is None:
            if self._computed[0] != strengths:
                self._computed = {}, {}  # freed first
                self._computed = strengths, self._summed(strengths)
            return self._computed[1]
        if own.name not in self._kept:
            wanted = [one for one in own.weights if one.name in self.bound]
            self._kept[own.name] = bound_weights(
                wanted, self.folder, self._device, verify=self._verify, told=self._told
            )
        return self._kept[own.name]

    @property
    def _device(self) -> torch.device:
        return next(iter(self.bound.values())).device

    def _summed(self, strengths: Mapping[str, float]) -> dict[str, Tensor]:
        """Weights with several sets, or one at another strength; those that the rank binds."""
        base = _Bound(self.bound, Base(self.folder, verify=self._verify))
        changes = changes_at(self.manifest, self.folder, strengths, verify=self._verify)
        changed = Changed(self.manifest, base, changes)
        found = {}
        for name in changed:
            if name in self.bound:
                found[name] = changed[name]
                self._told(name)
        if any(name.startswith("constants.") for name in self.bound):
            files = Base(self.folder, verify=False)
            cpu = Changed(self.manifest, files, changes)
            new = changed_constants(self.manifest, self.folder, cpu, files)
            found |= {name: one.to(self._device) for name, one in new.items()}
        return found


class _Bound:
    """Weights where the rank has them; from their files where it has not."""

    def __init__(self, bound: Mapping[str, Tensor], files: Base) -> None:
        self._bound, self._files = bound, files

    def tensor(self, weight: Weight) -> Tensor:
        """See :class:`..lora.base.Numbers`."""
        if weight.name in self._bound:
            return self._bound[weight.name]
        return self._files.tensor(weight)


def _said(strengths: Mapping[str, float]) -> str:
    return ", ".join(f"{name}={value:g}" for name, value in strengths.items()) or "none"
