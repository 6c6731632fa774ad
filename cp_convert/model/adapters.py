"""A LoRA that a model file has put into its model, which weights from files would overwrite."""

from __future__ import annotations

from torch import nn

from ..errors import WeightsError


def check_no_adapters(module: nn.Module) -> None:
    """Refuse to overwrite what ``build_model()`` has attached or fused.

    diffusers leaves ``_hf_peft_config_loaded`` on a model that a LoRA was loaded into, also when it
    was fused and unloaded afterwards.

    Raises:
        WeightsError: there is one.
    """
    names = [n for n, _ in module.named_parameters() if ".lora_" in f".{n}"]
    layers = [n for n, part in module.named_modules() if hasattr(part, "base_layer")]
    had = [n for n, part in module.named_modules() if "_hf_peft_config_loaded" in vars(part)]
    if not (names or layers or had):
        return
    is_fused = not (names or layers) or any(getattr(m, "merged", False) for m in module.modules())
    what = (names or layers or [f"_hf_peft_config_loaded of {type(module).__name__}"])[0]
    raise WeightsError(
        f"build_model() has {'fused' if is_fused else 'attached'} a LoRA ({what}), and --weights "
        "would overwrite what it changes.",
        hint="leave --weights out, and the model is converted as build_model() returns it; or "
        "leave the LoRA out of build_model(), and name weights into which it was fused and saved.",
    )
