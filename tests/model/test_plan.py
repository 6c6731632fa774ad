import pytest
from diffusers.models._modeling_parallel import ContextParallelInput as TheirInput
from diffusers.models._modeling_parallel import ContextParallelOutput as TheirOutput

from cp_convert import ContextParallelInput, ContextParallelOutput
from cp_convert.errors import CannotShard
from cp_convert.ir.signature import Cut
from cp_convert.model.plan import normalise

MODULES = ["", "rope", "blocks", "blocks.0", "blocks.1", "blocks.0.attn", "blocks.1.attn", "out"]


def test_inputs_outputs_wildcards_and_lists() -> None:
    plan = {
        "": {"x": ContextParallelInput(1, expected_dims=3)},
        "blocks.*.attn": {"rotary": [ContextParallelInput(0), ContextParallelInput(0)]},
        "rope": {1: ContextParallelInput(2, split_output=True)},
        "out": [ContextParallelOutput(1), None, ContextParallelOutput(2)],
    }
    assert normalise(plan, MODULES) == (
        Cut("split", "", False, "x", None, 1, 3),
        Cut("split", "blocks.0.attn", False, "rotary", 0, 0, None),
        Cut("split", "blocks.0.attn", False, "rotary", 1, 0, None),
        Cut("split", "blocks.1.attn", False, "rotary", 0, 0, None),
        Cut("split", "blocks.1.attn", False, "rotary", 1, 0, None),
        Cut("split", "rope", True, 1, None, 2, None),
        Cut("gather", "out", True, 0, None, 1, None),
        Cut("gather", "out", True, 2, None, 2, None),
    )


def test_diffusers_own_words_mean_the_same() -> None:
    ours = {"": {"x": ContextParallelInput(1)}, "out": ContextParallelOutput(1)}
    theirs = {"": {"x": TheirInput(1)}, "out": TheirOutput(1)}
    assert normalise(ours, MODULES) == normalise(theirs, MODULES)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"block": ContextParallelOutput(1)}, "module 'block' that the model does not have"),
        ({"blocks.*.mlp": ContextParallelOutput(1)}, r"module 'blocks\.\*\.mlp'"),
        ({"out": {"x": 1}}, "has no integer split_dim"),
        ({"out": "dim 1"}, "has no integer gather_dim"),
        ({"rope": {0: ContextParallelInput(1)}}, "needs split_output=True"),
    ],
)
def test_mistakes_are_named(plan: dict[str, object], message: str) -> None:
    with pytest.raises(CannotShard, match=message):
        normalise(plan, MODULES)


def test_words() -> None:
    assert Cut("split", "m", False, "x", 2, 0, None).tensor == "input x[2]"
    assert Cut("gather", "m", True, 0, None, 0, None).tensor == "output 0"


def test_two_lines_for_one_tensor_are_both_named() -> None:
    plan = {
        "blocks.*": {"x": ContextParallelInput(1)},
        "blocks.1": {"x": ContextParallelInput(1)},
    }
    with pytest.raises(
        CannotShard, match=r"blocks\.1 twice: by cp_plan\['blocks\.\*'\]\['x'\] and"
    ):
        normalise(plan, MODULES)
