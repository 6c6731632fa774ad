"""Models that are refused as they are, whether or not they would be proven."""

import pytest
from torch import nn

from cp_convert.errors import ModelFileError
from cp_convert.model.checks import check_no_step_cache


def diffusers_block() -> nn.Module:
    """One diffusers transformer with a step cache, inside a wrapper."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.FluxTransformer2DModel(
        num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, in_channels=4, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    model.enable_cache(diffusers.FirstBlockCacheConfig(threshold=0.2))
    return model


def test_a_step_cache_that_is_on_is_refused_and_one_that_is_off_is_not() -> None:
    model = diffusers_block()
    whole = nn.ModuleDict({"transformer": model})
    with pytest.raises(ModelFileError, match=r"transformer has a step.*FirstBlock") as caught:
        check_no_step_cache(whole, "model.py")
    assert "disable_cache()" in (caught.value.hint or "")
    model.disable_cache()
    check_no_step_cache(whole, "model.py")


def test_hooks_of_a_cache_are_enough() -> None:
    """``apply_first_block_cache`` registers hooks and sets no flag."""
    model = diffusers_block()
    model._cache_config = None
    with pytest.raises(ModelFileError, match="the hook fbc_"):
        check_no_step_cache(model, "model.py")


def test_other_libraries_switches() -> None:
    module = nn.Linear(1, 1)
    check_no_step_cache(module, "model.py")
    module._is_cached = True
    with pytest.raises(ModelFileError, match=r"Linear has a step cache that is on \(_is_cached\)"):
        check_no_step_cache(module, "model.py")
