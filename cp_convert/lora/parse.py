"""Names of tensors in LoRA files: which module of which model, and which part of its change.

What trainers write: diffusers and PEFT ``X.lora_A.weight``, Kohya and LyCORIS
``lora_unet_X.lora_down.weight``, ``X.lokr_w1``, ``X.dora_scale``, ComfyUI
``diffusion_model.X.diff_b``; ``.alpha`` beside any of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

OTHERS: Final = re.compile(
    r"^(base_model\.model\.)?"
    r"(text_encoders?(_\d)?\.|te\d?\.|lora_te\d?_|conditioner\.|cond_stage_model\.|clip_[lg]\.|"
    r"t5xxl\.|transformer_2\.|vae\.|first_stage_model\.)"
)
"""How tensors of other models than the transformer begin."""
_PREFIXES: Final = (
    "base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "unet.",
)  # fmt: skip
_FLAT: Final = ("lora_unet_", "lora_transformer_", "lycoris_")
"""Before names whose dots were written as underscores."""
_PARTS: Final = {
    r"lora_A(\.\w+)?\.weight|lora_down(\.\w+)?\.weight|lora\.down\.weight": "down",
    r"lora_B(\.\w+)?\.weight|lora_up(\.\w+)?\.weight|lora\.up\.weight": "up",
    r"lora_B(\.\w+)?\.bias": "up_bias",
    r"diff_b": "bias",
    r"lora_magnitude_vector(\.\w+)?(\.weight)?|dora_scale": "magnitude",
    r"alpha": "alpha",
    r"diff": "full",
    **{f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b")},
}
_PATTERN: Final = re.compile(
    r"^(?P<module>.+?)\.(?:"
    + "|".join(f"(?P<p{i}>{pattern})" for i, pattern in enumerate(_PARTS))
    + ")$"
)
_NAMES: Final = tuple(_PARTS.values())


@dataclass(frozen=True)
class Module:
    """A module as a file names it.

    Attributes:
        name: without prefixes.
        flat: whether its dots were written as underscores.
    """

    name: str
    flat: bool


@dataclass(frozen=True)
class Parsed:
    """The names of a file.

    Attributes:
        modules: of each, the stored name of every part.
        others: names of other models' tensors.
        unknown: names of which nothing is known.
        twice: a module and a part that two names stand for, and both.
    """

    modules: Mapping[Module, Mapping[str, str]]
    others: tuple[str, ...]
    unknown: tuple[str, ...]
    twice: tuple[str, ...]


def parse(names: Iterable[str]) -> Parsed:
    """Sort the names of a file by module and part."""
    modules: dict[Module, dict[str, str]] = {}
    others, unknown, twice = [], [], []
    for name in names:
        found = _PATTERN.match(name)
        if OTHERS.match(name):
            others.append(name)
        elif found is None:
            unknown.append(name)
        else:
            part = next(p for i, p in enumerate(_NAMES) if found.group(f"p{i}") is not None)
            own = modules.setdefault(module_of(found["module"]), {})
            if part in own:
                twice += [own[part], name]
            own[part] = name
    return Parsed(modules, tuple(others), tuple(unknown), tuple(twice))


def module_of(name: str) -> Module:
    """The module without what trainers put before it."""
    for prefix in _FLAT:
        if name.startswith(prefix):
            return Module(name.removeprefix(prefix), flat="." not in name)
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return Module(name, flat=False)
