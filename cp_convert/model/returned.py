"""What a model file gave, checked before anything is done with it; moved to the CPU."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ModelFileError
from ..words import near
from .trees import PLAIN, make_known, watch_outputs
from .unwrap import unwrapped

_SHOWN: Final = 3


@dataclass(frozen=True)
class Blame:
    """A function of the model file, to be named in messages.

    Attributes:
        path: the model file.
        name: of the function.
        function: itself.
        given: what it was called with, in words.
    """

    path: Path
    name: str
    function: Any = None
    given: str = ""

    @property
    def where(self) -> str:
        """The file, and the line where the function begins if it is the file's own."""
        code = getattr(inspect.unwrap(self.function), "__code__", None) if self.function else None
        is_own = code is not None and Path(code.co_filename).absolute() == self.path.absolute()
        return f"{self.path}:{code.co_firstlineno}" if code and is_own else str(self.path)

    def error(self, text: str, hint: str | None = None) -> ModelFileError:
        """A complaint about what the function returned."""
        return ModelFileError(f"{self.name}({self.given}) {text}", where=self.where, hint=hint)


def model_from(value: Any, blame: Blame) -> nn.Module:
    """The model that ``build_model()`` returned, unwrapped and on the CPU.

    Raises:
        ModelFileError: it is none, or none that can be traced.
    """
    if not isinstance(value, nn.Module):
        raise blame.error(f"returned {_named(value)}, not a torch.nn.Module.", _towards(value))
    if isinstance(value, torch.jit.ScriptModule):
        raise blame.error(
            "returned a TorchScript module, which torch.export does not take.",
            "return the module that the script was made from.",
        )
    module = unwrapped(value)
    if "_forward_unimplemented" in getattr(module.forward, "__qualname__", ""):
        raise blame.error(
            f"returned a {type(module).__name__}, which defines no forward().",
            "is the method called otherwise, or indented wrongly?",
        )
    small = [n for n, p in module.named_parameters() if p.is_floating_point() and p.itemsize == 1]
    if small:
        dtype = str(module.get_parameter(small[0]).dtype).removeprefix("torch.")
        raise blame.error(
            f"returned a model with {len(small)} parameters in {dtype} ({_some(small)}), a type "
            "that torch stores and does not compute in.",
            "leave them in the type they were published in, and choose with --precision what the "
            "engines compute in; diffusers' enable_layerwise_casting() is understood.",
        )
    if not any(t.is_meta for t in (*module.parameters(), *module.buffers())):
        module = module.cpu()
    watch_outputs(module)
    return module


def _towards(value: Any) -> str | None:
    """What a person who returned this may have meant."""
    if value is None:
        return "does it lack a `return model`?"
    if isinstance(value, type):
        return f"return an instance: {value.__name__}(...)."
    if isinstance(value, tuple | list) and any(isinstance(v, nn.Module) for v in value):
        return "return the module alone."
    if inspect.iscoroutine(value) or inspect.isgenerator(value):
        value.close()  # else Python complains that nobody ran it
        return "write a plain function with `return model`."
    if isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values()):
        return "these look like weights: build the module, load them into it, and return it."
    inner = [n for n in ("transformer", "unet", "module", "model") if _has_module(value, n)]
    return f"return its .{inner[0]}, the module that is called in every step." if inner else None


def _has_module(value: Any, name: str) -> bool:
    return isinstance(getattr(value, name, None), nn.Module)


def check_has_numbers(module: nn.Module, path: Path, besides: Collection[str] = ()) -> None:
    """Refuse parameters without memory, ``besides`` those whose codes are all that is read.

    Raises:
        ModelFileError: some are on the ``meta`` device.
    """
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if empty := [name for name, one in tensors if one.is_meta and name not in besides]:
        raise ModelFileError(
            f"build_model() leaves {len(empty)} tensors without numbers, on the meta device: "
            f"{_some(empty)}.",
            where=str(path),
            hint="let it load them, or name their files with --weights.",
        )


def inputs_from(value: Any, blame: Blame, module: nn.Module) -> dict[str, Any]:
    """The arguments that ``example_inputs()`` returned, detached and on the CPU.

    Raises:
        ModelFileError: it returned something else, or an argument that no program can take.
    """
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
        told = "a dict with keys that are no words" if isinstance(value, Mapping) else _named(value)
        names = list(inspect.signature(module.forward).parameters)[:_SHOWN]
        raise blame.error(
            f"returned {told}, not a dict of keyword arguments.",
            f"return {{{', '.join(f'{name!r}: ...' for name in names)}}}, as "
            f"{type(module).__name__}.forward calls them.",
        )
    return {name: _argument(one, name, blame) for name, one in value.items()}


def _argument(value: Any, name: str, blame: Blame) -> Any:
    for path, one in make_known(value):
        _check_leaf(one, f"{name}.{path}" if path else name, blame)
    leaves, spec = pytree.tree_flatten(value)
    return pytree.tree_unflatten([_usable(leaf, name, blame) for leaf in leaves], spec)


def _check_leaf(value: Any, name: str, blame: Blame) -> None:
    if not isinstance(value, PLAIN):
        is_array = type(value).__module__ == "numpy"
        raise blame.error(
            f"gives {_named(value)} for {name!r}, which no program can take.",
            f"torch.from_numpy({name}), or a Python number."
            if is_array
            else "give tensors, numbers, words, and lists, dicts or dataclasses of them; what else "
            "forward needs, build_model() can keep on the module.",
        )


def _usable(leaf: Any, name: str, blame: Blame) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.is_meta:
        raise blame.error(
            f"gives a tensor on the meta device for {name!r}, which has no numbers.",
            "the proof runs the model with them: make the tensor on the CPU.",
        )
    if leaf.layout != torch.strided or leaf.is_quantized or leaf.is_nested:
        kind = "nested" if leaf.is_nested else str(leaf.layout).removeprefix("torch.")
        raise blame.error(
            f"gives a {'quantized' if leaf.is_quantized else kind} tensor for {name!r}.",
            "an engine's inputs are dense tensors of one shape.",
        )
    if leaf.numel() == 0:
        raise blame.error(
            f"gives an empty tensor for {name!r}, of shape {list(leaf.shape)}.",
            "give the shape that the engines are to have; its values do not matter.",
        )
    return leaf.detach().cpu()


def names_from(python: ModuleType, name: str, inputs: Iterable[str], path: Path) -> tuple[str, ...]:
    """``freeze`` or ``keep_float32`` of the model file: names of arguments.

    Raises:
        ModelFileError: it is no list of words, or names an argument that is not given.
    """
    told = getattr(python, name, None) or ()
    names = (told,) if isinstance(told, str) else told
    if not isinstance(names, list | tuple | set | frozenset) or not all(
        isinstance(one, str) for one in names
    ):
        raise ModelFileError(
            f"{name} is {told!r}, and should be a list of names of forward's arguments.",
            where=str(path),
            hint=f'{name} = ["timestep"]',
        )
    known = list(inputs)
    for one in names:
        if one not in known:
            raise ModelFileError(
                f"{name} names {one!r}, and example_inputs() gives no such argument.",
                where=str(path),
                hint=near(one, known),
            )
    return tuple(names)


def required(function: Callable[..., Any], given: Iterable[str] = ()) -> list[str]:
    """Parameters that have no default and are not in ``given``."""
    single = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [
        name
        for name, one in inspect.signature(function).parameters.items()
        if one.default is one.empty and one.kind not in single and name not in given
    ]


def _named(value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"a value of type {type(value).__name__}"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
