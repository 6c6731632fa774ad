"""Models that are refused as they are, whether or not they would be proven."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

from cp_convert.errors import ModelFileError
from cp_convert.model.checks import check_no_step_cache, check_plain_tensors


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


class Packed(nn.Parameter):
    """As libraries of packed weights have them: no wrapper, but calls are theirs."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Named(nn.Parameter):
    """A name alone, which changes nothing."""


def test_tensors_of_a_librarys_own_kind() -> None:
    whole = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.LazyLinear(3))
    whole[0].weight = Named(torch.ones(2, 2))
    check_plain_tensors(whole, "model.py")
    whole[1].running_mean = TwoTensor(torch.zeros(2), torch.zeros(2))
    with pytest.raises(ModelFileError, match=r"1\.running_mean is a TwoTensor of torch") as caught:
        check_plain_tensors(whole, "model.py")
    assert "return the whole model" in (caught.value.hint or "")
    own: Tensor = Packed(torch.ones(2, 2))
    whole[0].weight = own
    with pytest.raises(ModelFileError, match=r"0\.weight is a Packed of tests") as caught:
        check_plain_tensors(whole, "model.py")
    assert "--quantize" in (caught.value.hint or "")
