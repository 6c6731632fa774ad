"""Modules in the names of a model's authors, found by diffusers' own conversion of LoRA files.

diffusers knows which module of theirs is which of its own, or which rows of it (a joined QKV is
three weights there). Its functions also multiply by alpha in the file's type, and leave out what
they do not know. So they are not given the file, but numbered rows under the file's names::

    double_blocks.0.img_attn.qkv  up = [[0], [1], ... [9215]]
    ->  transformer_blocks.0.attn.to_q = rows 0 ... 3071, to_k = 3072 ... , to_v = 6144 ...

and what comes back says where every row went, for LoRA, DoRA and LoKr alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module, util
from typing import Any, Final

import torch
from torch import Tensor

from .parse import Module

Rows = Mapping[str, Tensor]
"""By module of diffusers', which rows are its, in order."""
_LOADERS: Final = {
    "CogVideoXTransformer3DModel": "CogVideoXLoraLoaderMixin",
    "Flux2Transformer2DModel": "Flux2LoraLoaderMixin",
    "FluxTransformer2DModel": "FluxLoraLoaderMixin",
    "HiDreamImageTransformer2DModel": "HiDreamImageLoraLoaderMixin",
    "HunyuanVideoTransformer3DModel": "HunyuanVideoLoraLoaderMixin",
    "LTX2VideoTransformer3DModel": "LTX2LoraLoaderMixin",
    "LTXVideoTransformer3DModel": "LTXVideoLoraLoaderMixin",
    "Lumina2Transformer2DModel": "Lumina2LoraLoaderMixin",
    "QwenImageTransformer2DModel": "QwenImageLoraLoaderMixin",
    "SkyReelsV2Transformer3DModel": "SkyReelsV2LoraLoaderMixin",
    "WanTransformer3DModel": "WanLoraLoaderMixin",
    "ZImageTransformer2DModel": "ZImageLoraLoaderMixin",
}
"""By class of the model, diffusers' loader of its LoRA files."""
_LENT: Final = 4096
"""Modules, at most, that are lent to a conversion which wants all of a block."""


def original_rows(
    kind: str, sizes: Mapping[Module, int], modules: Collection[str]
) -> dict[Module, Rows]:
    """Where diffusers puts the rows of modules in their authors' names.

    Args:
        kind: the model's class.
        sizes: rows of every module that is not the model's own.
        modules: the model's own.

    Returns:
        those that diffusers knows, and the model has.
    """
    loader = _loader(kind)
    found: dict[Module, Rows] = {}
    if loader is None:
        return found
    for style in (_dotted, _plain, _kohya):
        rest = {module: rows for module, rows in sizes.items() if module not in found}
        found |= _in_style(loader, style, rest, modules) if rest else {}
    return found


def _in_style(
    loader: Any, style: Callable[[str], str], sizes: Mapping[Module, int], modules: Collection[str]
) -> dict[Module, Rows]:
    """All at once; one by one where that fails, so that one that is unknown spoils no other."""
    found = _rows(loader, style, sizes)
    if not found:
        for module, rows in sizes.items():
            found |= _rows(loader, style, {module: rows})
    return {m: pieces for m, pieces in found.items() if all(name in modules for name in pieces)}


def _rows(
    loader: Any, style: Callable[[str], str], sizes: Mapping[Module, int]
) -> dict[Module, Rows]:
    firsts, total = {}, 0
    for module, rows in sizes.items():
        firsts[module] = total
        total += rows
    given = {style(m.name): torch.arange(firsts[m], firsts[m] + sizes[m]) for m in sizes}
    return _pieces(_converted(loader, given), firsts, sizes)


def _loader(kind: str) -> Any:
    name = _LOADERS.get(kind)
    if name is None or util.find_spec("diffusers") is None:
        return None
    return getattr(import_module("diffusers.loaders.lora_pipeline"), name, None)


def _dotted(name: str) -> str:
    return f"diffusion_model.{name}.lora_A|lora_B"


def _plain(name: str) -> str:
    return f"transformer.{name}.lora_A|lora_B"


def _kohya(name: str) -> str:
    return f"lora_unet_{name.replace('.', '_')}.lora_down|lora_up"


def _converted(loader: Any, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What diffusers makes of rows under these names; nothing where it does not know them.

    Some conversions want every module of a block: those that are missing are lent, as rows of
    their own, and are asked for by the ``KeyError``.
    """
    state: dict[str, Tensor] = {}
    for name, rows in given.items():
        state |= _factors(name, rows)
    for _ in range(_LENT):
        try:
            return dict(loader.lora_state_dict(dict(state)))
        except KeyError as missing:
            lent = _lent(str(missing.args[0]), state)
            if not lent:
                return {}
            state |= lent
        # Written for published files, they fail in any way with others.
        except (LookupError, ValueError, TypeError, AttributeError, AssertionError, RuntimeError):
            return {}
    return {}


def _factors(name: str, rows: Tensor) -> dict[str, Tensor]:
    """A LoRA of rank 1 whose product has the rows' numbers; in float64, which holds them all."""
    module, _, parts = name.rpartition(".")
    down, up = parts.split("|")
    factors = {
        f"{module}.{down}.weight": torch.ones(1, 1, dtype=torch.float64),
        f"{module}.{up}.weight": rows.to(torch.float64)[:, None],
    }
    # One that is not there counts as the rank where names are dotted, and is demanded elsewhere.
    alpha = {f"{module}.alpha": torch.ones((), dtype=torch.float64)} if up == "lora_up" else {}
    return factors | alpha


def _lent(missing: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors of a module that is missing; its rows are negative, and belong to nobody."""
    module, _, part = missing.partition(".")
    if part not in ("lora_down.weight", "lora_up.weight", "alpha"):
        return {}
    name = f"lora_unet_{module.removeprefix('lora_unet_')}.lora_down|lora_up"
    lent = _factors(name, torch.full((1,), -1))
    return {} if any(one in state for one in lent) else lent


def _pieces(
    converted: Mapping[str, Tensor], firsts: Mapping[Module, int], sizes: Mapping[Module, int]
) -> dict[Module, Rows]:
    """By module, who has got its rows; only those of whom none was lost."""
    ends: dict[str, Tensor] = {}
    for name, rows in converted.items():
        if name.endswith(".lora_B.weight") and rows.dim() == 2:
            target = name.removesuffix(".lora_B.weight").removeprefix("transformer.")
            ends[target] = rows[:, 0].round().to(torch.int64)
    found: dict[Module, Rows] = {}
    for module, first in firsts.items():
        last = first + sizes[module]
        own = {n: r - first for n, r in ends.items() if bool(((r >= first) & (r < last)).all())}
        if _all_rows(own.values(), sizes[module]):
            found[module] = own
    return found


def _all_rows(pieces: Iterable[Tensor], count: int) -> bool:
    listed = list(pieces)
    return bool(listed) and torch.equal(torch.cat(listed).sort().values, torch.arange(count))
