"""A model's own plan of weights: what it names is shared and nothing else; what is wrong in it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from cp_convert import PackedColwiseParallel, PackedRowwiseParallel
from cp_convert.backends import select
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.errors import CannotShard, UsageError
from cp_convert.ir.shares import Divided
from cp_convert.job import Job
from cp_convert.mesh import Mesh
from cp_convert.model.load import load
from cp_convert.model.tp_plan import declared
from cp_convert.pipeline import convert
from cp_convert.progress import Progress
from cp_convert.recall import values_key
from tests.conftest import table
from tests.sharding.test_tensor import Apart, Packed, block, inputs

MIXER = {
    "mixer.q": "colwise", "mixer.k": "colwise", "mixer.v": "colwise", "mixer.out": "rowwise",
}  # fmt: skip
PACKED = {
    "mixer.enter": PackedColwiseParallel([1, 1, 1, 2, 2]),
    "mixer.out": PackedRowwiseParallel([1, 2]),
}
MLP = {"up": "colwise", "down": "rowwise"}


def divided(module: nn.Module, plan: dict[str, Any], tp: int = 2) -> Divided:
    module = block(module)
    program, _ = trace(module, inputs(), {})
    read = declared(plan, module)
    by_node = {node: read[name] for node, name in program.parameters.items() if name in read}
    return along(decompose(program, table()), Mesh.of(tp, tp=tp), by_node)


def along(*args: Any) -> Divided:
    from cp_convert.sharding.others import along_others

    return along_others(*args)[1]


def matrices(found: Divided) -> set[str]:
    return {n for n in found.shares if found.program.state[n].dim() == 2}


@pytest.mark.parametrize(
    ("mixer", "plan", "shared"),
    [
        (Apart, MIXER, {"mixer_q", "mixer_k", "mixer_v", "mixer_out"}),
        (Apart, MLP, {"up", "down"}),
        (Packed, PACKED | {"modulation": "colwise"}, {"mixer_enter", "mixer_out", "modulation"}),
    ],
)  # fmt: skip
def test_only_what_is_named_is_shared(
    mixer: Callable[[], nn.Module], plan: dict[str, Any], shared: set[str]
) -> None:
    found = divided(mixer(), plan)
    assert matrices(found) == {f"p_{name}_weight" for name in shared}
    kept = [one.reason for one in found.kept]
    assert kept == (["the plan leaves its matrices out"] if plan is MLP else [])


@pytest.mark.parametrize(
    ("mixer", "plan", "tp", "why"),
    [
        (Apart, {**MIXER, "mixer.out": "colwise"}, 2, "mixer.out, which is split by its rows"),
        (Apart, {n: w for n, w in MIXER.items() if n != "mixer.out"}, 2,
         "names mixer.q, which is split together with mixer.out, which it leaves out"),
        (Apart, MIXER, 8, "mixer.q, which cannot be split: .*cannot be shared equally by 8 ranks"),
        (Apart, {"enter": "colwise"}, 2, "names enter, which cannot be split: "),
        (Packed, {**PACKED, "mixer.enter": "colwise"}, 2,
         r"mixer.enter, which has parts of \[96, 96, 96, 192, 192\] to be shared, not of \[672\]"),
        (Packed, {"mixer.enter": PackedColwiseParallel()}, 2, "in blocks of no length"),
        (Packed, {"mixer.enter": PackedColwiseParallel([5])}, 2, r"blocks of \[5\].* 672 outputs"),
        (Apart, {"mixer.query": "colwise"}, 2, "a module 'mixer.query' that the model does not"),
        (Apart, {"mixer.norm": "colwise"}, 2, "mixer.norm, a RMSNorm, which has no matrix"),
        (Apart, {"mixer.q": "columns"}, 2, "'columns' of mixer.q, which is no way to split"),
    ],
)  # fmt: skip
def test_what_the_program_does_not_let_be_is_refused_by_name(
    mixer: Callable[[], nn.Module], plan: dict[str, Any], tp: int, why: str
) -> None:
    with pytest.raises(CannotShard, match=why) as refused:
        divided(mixer(), plan, tp)
    assert refused.value.where is not None
    assert refused.value.where.startswith("tp_plan[")


PLANNED = (
    "def build_model",
    """from cp_convert import PackedColwiseParallel
tp_plan = {"qkv": PackedColwiseParallel([1, 1, 1]), "leave": "rowwise"}

def build_model""",
)


def test_a_files_plan_is_taken_and_a_class_where_it_is_asked_for(
    model_file: Callable[..., Path],
) -> None:
    own = model_file(PLANNED, name="own.py")
    classes = (
        "    return Model()",
        '    Model._tp_plan = {"leave": "rowwise"}\n    return Model()',
    )
    both = model_file(PLANNED, classes, name="both.py")
    of_class, plain = model_file(classes, name="of_class.py"), model_file(name="plain.py")

    def names(path: Path, plan: str | None, tp: int = 2) -> list[str]:
        job = Job(path, "ulysses", 2, Path(), tp=tp, tp_plan=plan)
        return [one.module for one in load(job).tp_plan.values()]

    assert names(own, None) == names(both, "model") == ["qkv", "leave"]
    assert names(of_class, "model") == ["leave"]
    assert names(own, "auto") == names(of_class, None) == names(own, None, tp=1) == []
    with pytest.raises(CannotShard, match="Model has no plan of weights"):
        names(plain, "model")
    with pytest.raises(UsageError, match="--tp-plan model: it is for --tp"):
        names(own, "model", tp=1)


def test_the_plan_is_in_the_jobs_key(model_file: Callable[..., Path]) -> None:
    job = Job(model_file(PLANNED), "ulysses", 2, Path(), tp=2)
    source = load(job)
    assert values_key(job, source) not in (None, values_key(job, replace(source, tp_plan={})))


def test_a_bundle_says_whose_plan_it_was(model_file: Callable[..., Path], tmp_path: Path) -> None:
    job = Job(
        model_file(PLANNED), "ulysses", 2, tmp_path / "out", tp=2, precision="fp32",
        proof="program",
    )  # fmt: skip
    tensor = convert(job, select("auto", ()), Progress()).tensor
    assert tensor is not None
    assert tensor.plan == "model"
    assert [one.name for one in tensor.weights if one.name.endswith("weight")] == [
        "qkv.weight", "leave.weight",
    ]  # fmt: skip
