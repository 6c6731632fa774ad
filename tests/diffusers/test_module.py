"""The module on an executor that stands in: what it takes, returns and refuses."""

import copy
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cp_convert.bundle import manifest as m
from cp_convert.diffusers import Transformer
from cp_convert.diffusers.load import model_class
from cp_convert.diffusers.ranks import Ranks
from cp_convert.diffusers.refused import REFUSED
from cp_convert.errors import ConvertError, UsageError
from cp_convert.ir.frozen_value import digest_of
from cp_convert.ir.tensors import numbers
from cp_convert.runtime import Opened
from cp_convert.runtime.choice import Choice
from tests.bundle.test_folder import written

SAMPLE = m.Returned(kind="tensor", name="sample", keys=[], items=[])
NOTHING = m.Returned(kind="none", name=None, keys=[], items=[])
FIELDS = m.Returned(kind="fields", name="Output", keys=["sample", "sound"], items=[SAMPLE, NOTHING])
INDEX = torch.arange(4)


class StandIn:
    """Doubles ``x`` into one buffer for all calls, as TensorRT does."""

    name = "torch"
    steps = None

    def __init__(self, manifest: m.Manifest) -> None:
        self.manifest, self.rank, self.choice = manifest, 0, Choice(manifest)
        self.buffer = torch.zeros(1, 4)
        self.given: dict[str, Tensor] = {}

    def picked(self, arguments: dict[str, Any]) -> tuple[str | None, dict[str, Tensor]]:
        return self.choice.picked(arguments)

    def run(self, variant: str | None, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self.variant, self.given = variant, given
        return {"sample": torch.mul(given["x"], 2, out=self.buffer)}

    def close(self) -> None:
        self.buffer = torch.empty(0)


def _input(name: str, dtype: str, *shape: int) -> m.Io:
    return m.Io(name=name, mode="input", dtype=dtype, shape=list(shape))


def _manifest(folder: Path, **changed: Any) -> m.Manifest:
    written(folder)
    manifest = m.decode((folder / "manifest.json").read_bytes())
    frozen = [
        m.Frozen(name="scale", value="2", sha256=None),
        m.Frozen(name="grid.0.0", value="4", sha256=None),
        m.Frozen(name="grid.0.1", value="6", sha256=None),
        m.Frozen(name="index", value="[tensor([0, 1, 2, 3])]", sha256=digest_of([INDEX])),
    ]
    names = [
        "x",
        "timestep",
        "mask",
        "scale",
        "grid",
        "index",
        "guidance",
        "joint_attention_kwargs",
    ]
    defaults = {"mask": "None", "scale": "1.0", "guidance": "None", "return_dict": "True"}
    return msgspec.structs.replace(
        manifest,
        **{
            "model": msgspec.structs.replace(manifest.model, config={"patch_size": [1, 2]}),
            "precision": "fp32",
            "io": [
                _input("x", "float32", 1, 4),
                _input("timestep", "int64", 1),
                _input("mask", "bool", 1, 4),
                m.Io(name="sample", mode="output", dtype="float32", shape=[1, 4]),
            ],
            "frozen": frozen,
            "forward": m.Forward(
                arguments=[*names, "joint_attention_kwargs", "return_dict"],
                defaults={**defaults, "joint_attention_kwargs": "None"},
                returned=FIELDS,
            ),
            **changed,
        },
    )


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., Transformer]:
    def make(**changed: Any) -> Transformer:
        manifest = _manifest(tmp_path / "bundle", **changed)
        opened = Opened(StandIn(manifest))  # type: ignore[arg-type]
        ends = ExitStack()
        ends.callback(opened.close)
        return model_class()(
            opened, torch.device("cpu"), config=manifest.model.config or {},
            ranks=Ranks(None, check=True), ends=ends,
        )  # fmt: skip

    return make


def arguments(**changed: Any) -> dict[str, Any]:
    return {
        "x": torch.ones(1, 4), "timestep": torch.tensor([7]), "mask": torch.ones(1, 4).bool(),
        "scale": 2, "grid": [[(4, 6)]], "index": [INDEX], **changed,
    }  # fmt: skip


def test_a_result_is_kept_when_the_next_call_comes(made: Callable[..., Transformer]) -> None:
    module = made()
    first = module(**arguments())[0]
    second = module(**arguments(x=torch.zeros(1, 4)))[0]
    assert torch.equal(first, torch.full((1, 4), 2.0)) and torch.equal(second, torch.zeros(1, 4))


def test_return_dict_both_ways(made: Callable[..., Transformer]) -> None:
    module = made()
    whole = module(**arguments())
    assert whole.sample is whole[0] is whole["sample"] and whole.sound is None
    assert module(**arguments(), return_dict=True).sample.shape == (1, 4)
    found, sound = module(**arguments(), return_dict=False)
    assert torch.equal(found, whole.sample) and sound is None


@pytest.mark.parametrize(
    ("returned", "is_tuple"),
    [(SAMPLE, False), (m.Returned(kind="tuple", name=None, keys=[], items=[SAMPLE]), True)],
)
def test_a_model_that_was_converted_without_named_fields(
    made: Callable[..., Transformer], returned: m.Returned, is_tuple: bool
) -> None:
    module = made(
        forward=m.Forward(
            arguments=["x", "timestep", "mask", "scale", "grid", "index"],
            defaults={},
            returned=returned,
        )
    )
    assert isinstance(module(**arguments()), tuple) is is_tuple
    assert module(**arguments(), return_dict=True).sample.shape == (1, 4)
    assert module(**arguments(), return_dict=False)[0].shape == (1, 4)


def test_tensors_become_the_bundle_s(made: Callable[..., Transformer]) -> None:
    module = made()
    given = arguments(x=torch.ones(1, 4).half(), timestep=torch.tensor([7.0]), mask=None)
    module(given.pop("x"), **given, guidance=None, joint_attention_kwargs={"scale": 1.0})
    taken = module._opened.executor.given  # type: ignore[union-attr]
    assert {n: t.dtype for n, t in taken.items()} == {
        "x": torch.float32, "timestep": torch.int64, "mask": torch.bool,
    }  # fmt: skip
    assert taken["mask"].all(), "a mask that is left out excludes no token"


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"scale": 3}, "scale is 3; the engines were built with 2"),
    ({"scale": torch.tensor(2)}, "scale is a tensor of shape []; the engines were built with 2"),
    ({"grid": [[(6, 4)]]}, "grid is [[(6, 4)]]; the engines were built with 4, 6"),
    ({"grid": [[(4, 6)], [(4, 6)]]}, "grid is [[(4, 6)], [(4, 6)]]; the engines"),
    (
        {"index": [INDEX + 1]},
        "index is [tensor([1, 2, 3, 4])]; the engines were built with [tensor(",
    ),
    ({"guidance": torch.ones(1)}, "guidance is a tensor of shape [1]; the bundle was made without"),
    ({"joint_attention_kwargs": {"scale": 0.5}}, "joint_attention_kwargs is {'scale': 0.5}"),
    ({"joint_attention_kwargs": {"ip_hidden_states": [INDEX]}}, "joint_attention_kwargs is {'ip"),
    ({"x": torch.ones(1, 6)}, "x has the shape [1, 6]; the bundle has x [1, 4], timestep [1]"),
    ({"x": None}, "x is None, and the engines take a tensor there"),
    ({"x": 1.0}, "x is 1.0, and the engines take a tensor there"),
    ({"timestep": torch.tensor([7.5])}, "timestep is float32, the engines take int64"),
    ({"control": INDEX}, "the bundle has no input 'control'"),
]


@pytest.mark.parametrize(("changed", "message"), REFUSALS)
def test_what_the_engines_do_not_take_is_refused(
    made: Callable[..., Transformer], changed: dict[str, Any], message: str
) -> None:
    module = made()
    with pytest.raises(UsageError, match=re.escape(message)):
        module(**arguments(**changed))
    module(**arguments(scale=2.0, grid=((4, 6),), index=[INDEX.int()]))


def test_an_argument_left_out_means_its_default(made: Callable[..., Transformer]) -> None:
    module, given = made(), arguments()
    del given["scale"]
    with pytest.raises(UsageError, match=r"scale is 1\.0; the engines were built with 2"):
        module(**given)
    del given["timestep"]
    with pytest.raises(UsageError, match="timestep is missing"):
        module(**{**given, "scale": 2})


def test_frozen_tensors_are_read_again_when_they_are_written(
    made: Callable[..., Transformer],
) -> None:
    module, index = made(), [INDEX.clone()]
    module(**arguments(index=index))
    module(**arguments(index=index))
    index[0][2] = 9
    with pytest.raises(UsageError, match="index is"):
        module(**arguments(index=index))


def test_it_stays_where_and_what_it_is(made: Callable[..., Transformer]) -> None:
    module = made()
    assert module.eval().to("cpu").to(torch.float32).to(torch.ones(1)).cpu().float() is module
    assert (module.device, module.dtype) == (torch.device("cpu"), torch.float32)
    assert module.requires_grad_(False) is module and next(module.buffers()).device.type == "cpu"
    with pytest.raises(UsageError, match="are on cpu, and are asked to cuda"):
        module.to("cuda")
    for asked in (lambda: module.to(dtype=torch.bfloat16), module.half):
        with pytest.raises(UsageError, match=r"compute in torch\.float32"):
            asked()
    with module.cache_context("cond", step_index=1, sigma=0.5):
        assert not module.is_cache_enabled
    module.unload_lora()


def test_the_configuration_is_the_model_s(made: Callable[..., Transformer]) -> None:
    module = made()
    for config in (module.config, copy.deepcopy(module.config)):
        assert config.patch_size == config["patch_size"] == module.patch_size == [1, 2]
        assert config.get("in_channels") is None and not hasattr(config, "in_channels")
    with pytest.raises(AttributeError, match="has no 'in_channels': it has patch_size"):
        _ = module.config.in_channels
    with pytest.raises(TypeError, match="part of the engines"):
        module.config.patch_size = [2]
    assert not hasattr(module, "encoder_hid_proj")
    with pytest.raises(AttributeError, match="a bundle has no 'rope'"):
        _ = module.rope


@pytest.mark.parametrize("name", REFUSED)
def test_what_only_a_model_can_do_is_refused(made: Callable[..., Transformer], name: str) -> None:
    with pytest.raises(UsageError, match=f"{name}: ") as refusal:
        getattr(made(), name)("x", adapter_name="y")
    assert refusal.value.hint


def test_a_closed_one_says_so(made: Callable[..., Transformer]) -> None:
    with made() as module:
        pass
    module.close()
    with pytest.raises(ConvertError, match="is closed"):
        module(**arguments())
    with pytest.raises(UsageError, match="rank 0 runs the pipeline"):
        made().follow()


@pytest.mark.parametrize("one", [torch.tensor(7).expand(1), torch.ones(2, 3).T, torch.ones(())])
def test_every_tensor_has_its_bytes(one: Tensor) -> None:
    assert bytes(numbers(one)) == one.contiguous().clone().numpy().tobytes()
    assert digest_of(one) == digest_of(one.clone())


def test_integers_that_half_precision_does_not_count(made: Callable[..., Transformer]) -> None:
    half = [_input("timestep", "bfloat16", 1), _input("x", "float32", 1, 4)]
    module = made(io=[*half, m.Io(name="sample", mode="output", dtype="float32", shape=[1, 4])])
    given = {name: arguments()[name] for name in ("x", "scale", "grid", "index")}
    module(**given, timestep=torch.tensor([1000]))
    with pytest.raises(UsageError, match="timestep is int64, the engines take bfloat16") as refusal:
        module(**given, timestep=torch.tensor([999]))
    assert 'keep_float32 = ["timestep"]' in str(refusal.value.hint)


def test_an_opened_bundle_compares_frozen_values_too(tmp_path: Path) -> None:
    opened = Opened(StandIn(_manifest(tmp_path / "bundle")))  # type: ignore[arg-type]
    given = arguments(grid=[(4, 6)], scale=2.0)
    assert opened(**given).sample.sum() == 8
    for name, value in (("index", [INDEX + 1]), ("scale", torch.tensor(2)), ("grid", [(4, 7)])):
        with pytest.raises(UsageError, match="which is part of them"):
            opened(**{**given, name: value})
