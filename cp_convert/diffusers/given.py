"""What a pipeline gives for a forward, as the bundle's inputs: checked, cast, on the device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..bundle.manifest import Frozen, Io, Manifest
from ..errors import UsageError
from ..ir.frozen_value import leaves
from ..model.branches import repeated
from ..runtime.arguments import inputs_of, unknown
from ..runtime.frozen import check_frozen, is_same, literal, shown

_EXACT: Final = 1 << 20
"""Elements up to which a change between integers and floating point is looked at."""


class Arguments:
    """The arguments of a bundle's model.

    Args:
        manifest: of the bundle.
        device: where its inputs are wanted.
        branches: how many calls with one row each belong together.
    """

    def __init__(self, manifest: Manifest, device: torch.device, branches: int = 1) -> None:
        self.manifest, self.device, self.branches = manifest, device, branches
        self.inputs = inputs_of(manifest)
        self.defaults = {n: literal(text) for n, text in manifest.forward.defaults.items()}
        self._frozen: dict[str, list[Frozen]] = {}
        for one in manifest.frozen:
            self._frozen.setdefault(_root(one.name), []).append(one)
        self._tensors: dict[str, list[str]] = {}
        for name in self.inputs:
            self._tensors.setdefault(_root(name), []).append(name)
        self._checked: dict[str, tuple[tuple[Tensor, int], ...]] = {}

    def bound(self, arguments: Mapping[str, Any]) -> dict[str, Tensor]:
        """Tensors by binding, in the manifest's order.

        Raises:
            UsageError: an argument that the bundle does not take, another value for one that is
                part of the engines, or a tensor of another shape.
        """
        own = self._frozen | self._tensors
        left_out = {n: v for n, v in self.defaults.items() if n in own and n not in arguments}
        found: dict[str, Tensor] = {}
        for name, value in {**arguments, **left_out}.items():
            if name == "return_dict":
                continue
            if name in self._tensors:
                found |= self._given(name, value)
            else:
                self._check_constant(name, value)
        missing = [name for name in self.inputs if name not in found]
        if missing:
            raise UsageError(
                f"the input {missing[0]} is missing; the bundle takes {', '.join(self.inputs)}.",
                hint="convert with example inputs that lack it, as the pipeline does.",
            )
        return {name: found[name] for name in self.inputs}

    def _given(self, name: str, value: Any) -> dict[str, Tensor]:
        """The tensors of one argument; what else it holds is compared."""
        if value is None:
            return dict(_whole(self._tensors[name], self.inputs, self.device))
        found: dict[str, Tensor] = {}
        rest: dict[str, Any] = {}
        for path, leaf in leaves(value, name):
            if path in self.inputs and isinstance(leaf, Tensor):
                found[path] = self._cast(path, leaf)
            elif path in self.inputs or isinstance(leaf, Tensor):
                raise unknown(path, leaf, self.inputs)
            else:
                rest[path] = leaf
        if rest or name in self._frozen:
            self._check_constant(name, rest)
        return found

    def _check_constant(self, name: str, value: Any) -> None:
        """An argument, or what of it is no tensor."""
        inside = self._frozen.get(name, [])
        if inside:
            self._check_frozen(name, value, inside)
        elif not (name.endswith("attention_kwargs") and value == {"scale": 1.0}):
            self._check_default(name, value)

    def _check_frozen(self, name: str, value: Any, inside: Sequence[Frozen]) -> None:
        """A pipeline gives the same tensors in every step; their numbers are read once."""
        state = _state(value)
        known = self._checked.get(name, ())
        same = len(known) == len(state) > 0 and all(
            x is y and m == n for (x, m), (y, n) in zip(known, state, strict=True)
        )
        if not same:
            self._compare(name, value, inside)
            self._checked[name] = state

    def _compare(self, name: str, value: Any, inside: Sequence[Frozen]) -> None:
        """With the value itself, or with a row of it for every branch."""
        try:
            check_frozen(name, value, inside)
        except UsageError:
            if self.branches == 1:
                raise
            check_frozen(name, repeated(value, self.branches), inside)

    def _check_default(self, name: str, value: Any) -> None:
        """An argument that the model was converted without."""
        if name not in self.defaults and name not in self.manifest.forward.arguments:
            raise unknown(name, value, self.inputs)
        default = self.defaults.get(name)
        if not is_same(value, default):
            raise UsageError(
                f"{name} is {shown(value)}; the bundle was made without it, which means "
                f"{shown(default)}.",
                hint=_ADVICE.get(
                    name.rpartition("_")[2],
                    "leave it out, or give it in the example inputs and convert again.",
                ),
            )

    def _cast(self, name: str, tensor: Tensor) -> Tensor:
        io = self.inputs[name]
        if list(tensor.shape) != io.shape:
            raise self._other_size(name, tensor)
        dtype = getattr(torch, io.dtype)
        cast = tensor.detach().to(self.device, dtype)
        if dtype.is_floating_point != tensor.dtype.is_floating_point:
            _check_exact(name, tensor, cast)
        return cast

    def _other_size(self, name: str, tensor: Tensor) -> UsageError:
        sizes = ", ".join(f"{io.name} {io.shape}" for io in self.inputs.values())
        named = self.manifest.request.resolution
        return UsageError(
            f"{name} has the shape {list(tensor.shape)}; the bundle has "
            f"{f'{named}: ' if named else ''}{sizes}.",
            hint=self._pairs(name, tensor)
            or "an engine's shapes are fixed. Run the pipeline at that size, or convert once "
            "more for this one (--resolution of a preset, example_inputs() of a model file): "
            f"{self.manifest.command}",
        )

    def _pairs(self, name: str, tensor: Tensor) -> str | None:
        """What helps a call of one branch, where the engines take all at once."""
        known = self.manifest.guidance
        if known is None or name not in known.inputs:
            return None
        of_one = [known.rows, *self.inputs[name].shape[1:]]
        if list(tensor.shape) != of_one:
            return None
        return (
            f"the engines take {known.branches} guidance branches at once, and this is one: "
            'load_transformer(..., guidance="pairs") brings the calls of a step together.'
        )


_ADVICE: Final = {
    "kwargs": "what it asks for (an IP adapter, a scale of LoRA, a mask) is not in the engines; "
    "leave it out, or convert the model with it.",
}


def _root(name: str) -> str:
    return name.partition(".")[0]


def _state(value: Any) -> tuple[tuple[Tensor, int], ...]:
    """The tensors within and how often each was written; none where torch does not count."""
    tensors = [leaf for _, leaf in leaves(value) if isinstance(leaf, Tensor)]
    if any(tensor.is_inference() for tensor in tensors):
        return ()
    return tuple((tensor, tensor._version) for tensor in tensors)


def _whole(
    names: Sequence[str], inputs: Mapping[str, Io], device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """For ``None``: pipelines leave a mask out that excludes no token."""
    for name in names:
        io = inputs[name]
        dtype = getattr(torch, io.dtype)
        if not name.endswith("mask") or dtype.is_floating_point:
            raise unknown(name, None, inputs)
        yield name, torch.ones(io.shape, dtype=dtype, device=device)


def _check_exact(name: str, tensor: Tensor, cast: Tensor) -> None:
    """Between integers and floating point only where no number changes.

    Raises:
        UsageError: one does.
    """
    if tensor.numel() <= _EXACT and not bool((cast.to(tensor) == tensor).all()):
        raise UsageError(
            f"{name} is {_dtype(tensor)}, the engines take {_dtype(cast)}, and its numbers are not "
            "the same there.",
            hint=f"convert with {name} in {_dtype(tensor)}, as the pipeline gives it; "
            f'keep_float32 = ["{_root(name)}"] keeps what half precision would round.',
        )


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
