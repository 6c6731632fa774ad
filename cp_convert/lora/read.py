"""A LoRA file as changes by module: names sorted, factors paired, alpha and numbers checked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import WeightsError
from ..ir.tensors import Location, bytes_of, is_finite, opened, tensor_at
from ..model.header import read_header
from .change import Change
from .parse import Module, Parsed, parse

_METADATA: Final = "lora_adapter_metadata"
"""Under which diffusers writes PEFT's configuration into a file's header, as JSON."""
_BESIDE: Final = "adapter_config.json"
"""PEFT's own configuration, beside its ``adapter_model.safetensors``."""
_SHOWN: Final = 4


@dataclass(frozen=True)
class Adapter:
    """What a file changes.

    Attributes:
        file: its path.
        weights: the change of every module's weight.
        biases: the change of its bias, where there is one.
        others: how many tensors belong to other models, such as text encoders.
    """

    file: Path
    weights: Mapping[Module, Change]
    biases: Mapping[Module, Change]
    others: int


def read(file: Path) -> Adapter:
    """Read a LoRA file.

    Raises:
        WeightsError: it is no safetensors file, no LoRA of a transformer, a factor is missing, a
            number is not finite, or an alpha cannot be.
    """
    stored = read_header(file)
    parsed = parse(stored)
    _check_names(file, parsed)
    tensors = _tensors(file, stored, parsed)
    config = _config(file)
    weights: dict[Module, Change] = {}
    biases: dict[Module, Change] = {}
    for module, names in parsed.modules.items():
        parts = {part: tensors[name] for part, name in names.items()}
        try:
            weight, bias = _changes(module, parts, config)
        except _Wrong as wrong:
            raise _bad(file, f"{module.name} {wrong}") from wrong
        weights |= {module: weight} if weight is not None else {}
        biases |= {module: bias} if bias is not None else {}
    return Adapter(file, weights, biases, len(parsed.others))


class _Wrong(Exception):
    """What is wrong with a module, in words that follow its name."""


def _bad(file: Path, reason: str, hint: str | None = None) -> WeightsError:
    hint = hint or "the file is incomplete or was written wrongly; fetch or save it again."
    return WeightsError(f"{file.name}: {reason}.", where=str(file), hint=hint)


def some(names: Any) -> str:
    """The first of several names."""
    listed = [str(name) for name in names]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _check_names(file: Path, parsed: Parsed) -> None:
    if parsed.twice:
        raise _bad(file, f"{' and '.join(parsed.twice[:2])} mean the same")
    if parsed.modules and parsed.unknown:
        raise _bad(
            file,
            f"{len(parsed.unknown)} tensors are of a kind that is not known: "
            f"{some(parsed.unknown)}",
            "known are LoRA, DoRA and LoKr, in the names of diffusers, PEFT, Kohya and ComfyUI; "
            "fuse the file with the tool that it was trained with, and convert the result.",
        )
    if parsed.modules:
        return
    if not parsed.others and not parsed.unknown:
        raise _bad(file, "it holds no tensors")
    if parsed.others:
        raise _bad(
            file,
            f"all its {len(parsed.others)} tensors belong to other models, such as a text encoder "
            f"({some(parsed.others)})",
            "the bundle holds the transformer alone; load this file into the pipeline.",
        )
    raise _bad(
        file,
        f"it is no LoRA: no name ends as a factor's does ({some(parsed.unknown)})",
        "known are LoRA, DoRA and LoKr, whose names end in .lora_A.weight, .lora_down.weight, "
        ".lokr_w1 or the like; fuse another kind with the tool that it was trained with, and "
        "convert the result.",
    )


def _tensors(file: Path, stored: Mapping[str, Location], parsed: Parsed) -> dict[str, Tensor]:
    """The transformer's tensors, finite; nothing is copied."""
    pages, found = bytes_of(file), {}
    for names in parsed.modules.values():
        for name in names.values():
            at = stored[name]
            if at.dtype is None or not (at.dtype.is_floating_point or name.endswith("alpha")):
                raise _bad(file, f"{name} is stored as {at.kind}, and factors are floating numbers")
            found[name] = tensor_at(at, pages)
            if not found[name].numel():
                raise _bad(file, f"{name} holds no numbers: it is {list(found[name].shape)}")
            if not is_finite(found[name]):
                raise _bad(file, f"{name} holds NaN or infinity")
    next(iter(stored.values())).check_unchanged()
    return found


def _config(file: Path) -> Mapping[str, Any]:
    """PEFT's configuration: ``r``, ``lora_alpha`` and their patterns; empty where there is none."""
    with opened(file) as tensors:
        told = (tensors.metadata() or {}).get(_METADATA)
    beside = file.parent / _BESIDE
    try:
        if told is not None:
            found = json.loads(told)
            return {name.removeprefix("transformer."): one for name, one in found.items()}
        if file.name == "adapter_model.safetensors" and beside.is_file():
            return dict(json.loads(beside.read_bytes()))
    except (ValueError, AttributeError, TypeError) as error:
        raise _bad(file, f"its configuration is no JSON object: {error}") from error
    return {}


def _changes(
    module: Module, parts: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[Change | None, Change | None]:
    """The changes of a module's weight and bias."""
    kinds = [
        kind
        for kind, begins in (("lora", ("up", "down")), ("lokr", ("w1", "w2")), ("full", ("full",)))
        if any(part.startswith(begins) and part != "up_bias" for part in parts)
    ]
    if len(kinds) > 1:
        raise _Wrong(f"is changed twice, as {' and as '.join(kinds)}")
    if not kinds:
        lone = set(parts) - {"bias"}
        if lone:
            raise _Wrong(f"has {', '.join(sorted(lone))} and no factors")
        return None, Change("full", {"full": parts["bias"]})
    make = {"lora": _lora, "lokr": _lokr, "full": _full}[kinds[0]]
    weight = make(module, parts, config)
    bias = None
    if "up_bias" in parts:
        bias = Change("full", {"full": parts["up_bias"]}, weight.scale)
    if "bias" in parts:
        bias = Change("full", {"full": parts["bias"]})
    return weight, bias


def _lora(module: Module, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Change:
    for part, other in (("up", "down"), ("down", "up")):
        if part not in parts:
            raise _Wrong(f"has a {_WORDS[other]} without its {_WORDS[part]}")
    up, down = parts["up"], parts["down"]
    if up.dim() < 2 or down.dim() < 2 or up[0].numel() != down.shape[0] or not down.shape[0]:
        raise _Wrong(
            f"has a {_WORDS['down']} of {list(down.shape)} and a {_WORDS['up']} of "
            f"{list(up.shape)}, whose ranks differ"
        )
    scale = _scale(module, parts, down.shape[0], config)
    return Change("lora", {"up": up, "down": down}, scale, magnitude=parts.get("magnitude"))


_WORDS: Final = {"up": "lora_B (up)", "down": "lora_A (down)"}


def _lokr(module: Module, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Change:
    tensors: dict[str, Tensor] = {}
    rank = None
    for name in ("w1", "w2"):
        own = {part: t for part, t in parts.items() if part.split("_")[0] == name}
        if set(own) not in ({name}, {f"{name}_a", f"{name}_b"}):
            listed = ", ".join(f"lokr_{part}" for part in sorted(own)) or "nothing"
            raise _Wrong(f"has {listed} where lokr_{name}, or its _a and _b, should be")
        if any(one.dim() < 2 for one in own.values()):
            raise _Wrong(f"has a lokr_{name} that is no matrix")
        if len(own) == 2:
            left, right = own[f"{name}_a"], own[f"{name}_b"]
            if left.dim() != 2 or left.shape[1] != right.shape[0]:
                raise _Wrong(
                    f"has a lokr_{name}_a of {list(left.shape)} and a lokr_{name}_b of "
                    f"{list(right.shape)}, whose ranks differ"
                )
            rank = right.shape[0]
        tensors |= own
    # As in LyCORIS, alpha counts only where a factor is a product of two.
    scale = 1.0 if rank is None else _scale(module, parts, rank, config)
    return Change("lokr", tensors, scale, magnitude=parts.get("magnitude"))


def _full(module: Module, parts: Mapping[str, Tensor], config: Mapping[str, Any]) -> Change:
    return Change("full", {"full": parts["full"]}, magnitude=parts.get("magnitude"))


def _scale(
    module: Module, parts: Mapping[str, Tensor], rank: int, config: Mapping[str, Any]
) -> float:
    """Alpha over rank; alpha is the rank where the file does not tell it."""
    if "alpha" in parts:
        if parts["alpha"].numel() != 1:
            raise _Wrong(f"has an alpha of {list(parts['alpha'].shape)}, not one number")
        alpha = float(parts["alpha"].to(torch.float64))
    else:
        told = _pattern(config.get("alpha_pattern"), module, _alpha(config, rank))
        if isinstance(told, bool) or not isinstance(told, int | float):
            raise _Wrong(f"has an alpha of {told!r}, which is no number")
        alpha = float(told)
    if not isfinite(alpha) or alpha <= 0:
        raise _Wrong(f"has an alpha of {alpha:g}; it has to be finite and positive")
    return alpha / (sqrt(rank) if config.get("use_rslora") else rank)


def _pattern(patterns: Any, module: Module, default: Any) -> Any:
    """PEFT's: the value of the first key that is the module's name or an end of it."""
    for key, value in (patterns or {}).items() if isinstance(patterns, dict) else ():
        plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
        if module.name == plain or module.name.endswith(f".{plain}"):
            return value
    return default


def _alpha(config: Mapping[str, Any], rank: int) -> Any:
    return config.get("lora_alpha", config.get("alpha", rank))
