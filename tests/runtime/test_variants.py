"""Three models of five variants each, run and switched within one process on each of two ranks."""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import runpy
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cp_convert import bundle as bundles
from cp_convert import cli
from cp_convert.errors import RunFailed, UsageError
from cp_convert.lora.add import add
from cp_convert.runtime.choice import fitting, views_of
from cp_convert.runtime.dense import compare
from tests.lora.files import diffusers_names, factors, fused, linears
from tests.runtime.bundles import converted
from tests.runtime.conftest import Several

Step = tuple[str, Any]


def told(bundle: Path, steps: Sequence[Step], folder: Path) -> list[list[Any]]:
    """By rank, what every step comes to.

    A step is ``("call", inputs)``, ``("lora", sets)`` or ``("open", variant)``; a tuple of two is
    one for each rank.
    """
    context = multiprocessing.get_context("forkserver")
    folder.mkdir()
    torch.save(list(steps), folder / "steps.pt")
    work = [context.Process(target=_rank, args=(bundle, rank, folder)) for rank in range(2)]
    for one in work:
        one.start()
    for one in work:
        one.join(120)
    assert [one.exitcode for one in work] == [0, 0]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _rank(bundle: Path, rank: int, folder: Path) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    from cp_convert import runtime
    from cp_convert.errors import ConvertError
    from cp_convert.runtime.join import joined

    torch.set_num_threads(1)
    found: list[Any] = []
    store = str(folder / "store")
    with ExitStack() as stack:
        stack.enter_context(joined(rank, 2, torch.device("cpu"), store=store, timeout=60))
        opened = stack.enter_context(runtime.open(bundle, executor="torch", device="cpu"))
        for kind, what in torch.load(folder / "steps.pt"):
            own = what[rank] if isinstance(what, tuple) else what
            try:
                if kind == "lora":
                    opened.use_lora(own)
                elif kind == "open":
                    opened.close()
                    opened = runtime.open(bundle, executor="torch", device="cpu", variant=own)
                else:
                    found.append(opened(**own)[0].clone())
            except ConvertError as error:
                found.append(f"{type(error).__name__}: {error.message}")
    torch.save(found, folder / f"{rank}.pt")


WANTED = {
    "flux": lambda name: "attn" in name or "proj_" in name,
    "wan": lambda name: "attn" in name or "ffn" in name,
    "qwen": lambda name: "attn" in name or "mlp" in name,
}


@pytest.mark.parametrize(
    "name",
    [
        "flux",
        pytest.param("wan", marks=pytest.mark.slow),
        pytest.param("qwen", marks=pytest.mark.slow),
    ],
)
def test_variants_and_sets_are_switched(
    name: str, several: Callable[[str], Several], tmp_path: Path
) -> None:
    made = several(name)
    bundle = Path(shutil.copytree(made.bundle, tmp_path / "out"))
    dense = made.model()
    own = factors(linears(dense, WANTED[name]), 1)
    add(bundle, diffusers_names(own, tmp_path / "a.safetensors"), scale=0.8)
    models = {None: dense, "a": fused(copy.deepcopy(dense), [(own, 0.8)])}
    inputs = [made.inputs(**sizes) for sizes in made.variants.values()]
    steps: list[Step] = []
    wanted: list[Tensor] = []
    for lora, order in ((None, [0, 1, 2, 3, 4]), ("a", [4, 0, 1, 3]), (None, [2, 2, 0])):
        steps += [("lora", lora), *(("call", inputs[one]) for one in order)]
        with torch.no_grad():
            wanted += [models[lora](**inputs[one], return_dict=False)[0] for one in order]
    for rank in told(bundle, steps, tmp_path / "ranks"):
        for found, want in zip(rank, wanted, strict=True):
            assert found.shape == want.shape
            assert (found - want).abs().max() <= 1e-5 * want.abs().max()
        assert (rank[5] - rank[4]).abs().max() > 1e-2 * rank[4].abs().max()  # the set matters
        assert torch.equal(rank[0], rank[11])  # and leaves nothing behind


def test_what_no_variant_has_and_ranks_that_disagree(
    several: Callable[[str], Several], tmp_path: Path
) -> None:
    made = several("flux")
    first, second = made.inputs(), made.inputs(rows=5)
    between = made.inputs(rows=7)
    wrong = {**first, "timestep": first["timestep"].double()}
    steps = [
        ("call", first), ("call", between), ("call", (first, second)), ("call", (first, between)),
        ("call", wrong), ("call", {**first, "nothing": torch.ones(1)}), ("call", second),
        ("call", {name: one for name, one in first.items() if name != "guidance"}),
        ("call", (wrong, first)), ("call", {**first, "hidden_states": first["timestep"]}),
        ("call", first), ("open", ("v0", "v1")), ("open", ("v0", "v9")), ("open", "v1"),
        ("call", second), ("call", first),
    ]  # fmt: skip
    ranks = told(made.bundle, steps, tmp_path / "ranks")
    nearest = (
        "UsageError: no variant of the bundle has these inputs; the nearest is v0, and dimension 1 "
        "of hidden_states is 48 there, 56 here; dimension 0 of img_ids is 48 there, 56 here."
    )
    for rank in ranks:
        assert rank[1] == nearest
        assert rank[2] == (
            "RunFailed: rank 1 was given inputs of the variant v1, and rank 0 of v0."
        )
        assert rank[4].startswith("UsageError: timestep is float64; the engines take float32")
        assert rank[5].startswith("UsageError: the bundle has no input 'nothing'")
        assert rank[7].startswith("UsageError: the input guidance is missing")
        assert "hidden_states has the shape [1, 48, 16] there, here [1]" in rank[9]
        assert torch.equal(rank[0], rank[10])
        assert rank[6].shape == (1, 40, 16)
        assert rank[11] == "RunFailed: rank 1 opens v1, and rank 0 v0."
        assert torch.equal(rank[13], rank[6])
        assert "hidden_states has the shape [1, 48, 16]; the engines were built for" in rank[14]
    assert ranks[1][12] == "UsageError: the bundle has no variant 'v9'."
    refused = "RunFailed: rank {} cannot run what it is asked for: "
    assert ranks[0][3].startswith(refused.format(1) + "no variant of the bundle")
    assert ranks[0][12].startswith(refused.format(1) + "the bundle has no variant 'v9'")
    assert ranks[1][3] == nearest
    assert ranks[1][8].startswith(refused.format(0) + "timestep is")


POSITIONS = (
    ("def __init__(self):\n        super().__init__()\n",
     ("def __init__(self):\n        super().__init__()\n"
     "        self.places = nn.Parameter(torch.randn(1, 64, 5))\n")),
    ("self.qkv(self.enter(x))",
     "self.qkv(self.enter(x) + functional.interpolate(self.places, x.shape[1]).transpose(1, 2))"),
    ("def example_inputs():", "def example_inputs(tokens=16):"),
    ("torch.randn(1, 16, 8)", "torch.randn(1, tokens, 8)"),
)  # fmt: skip


def test_what_follows_from_weights_is_each_variants_own(
    model_file: Callable[..., Path], tmp_path: Path
) -> None:
    """Places that are learned for one length, and interpolated to others."""
    path = model_file(*POSITIONS)
    path.write_text(path.read_text() + '\nvariants = {"a": {}, "b": {"tokens": 24}}\n')
    out = tmp_path / "out"
    manifest = converted(path, out, "ulysses", 2, weights_mode="external", proof="program")
    assert {one.name for one in manifest.weights} >= {"qkv.weight"}
    (constant,) = [w for w in manifest.weights if w.name.startswith("constants.")]
    (own,) = manifest.variants[0].weights
    assert own.name == constant.name and own.shape != constant.shape
    assert own.file == "variants/b/constants.safetensors"
    assert not [check for check in bundles.verify(out) if check.problem]
    python = SimpleNamespace(**runpy.run_path(str(path)))
    inputs = [python.example_inputs(tokens) for tokens in (16, 24, 16)]
    with torch.no_grad():
        wanted = [python.build_model()(**one) for one in inputs]
    for rank in told(out, [("call", one) for one in inputs], tmp_path / "ranks"):
        for found, want in zip(rank, wanted, strict=True):
            assert (found - want[0]).abs().max() <= 1e-5 * want.abs().max()
    dense = python.build_model()
    file = diffusers_names(factors(linears(dense, lambda _: True), 1), tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"variant b has constants\..* of its own"):
        add(out, file)


Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """``cp-convert run``, in this process: its exit code and what it says."""
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["run", *map(str, arguments), "--devices", "cpu"])
        said = capfd.readouterr()
        return int(stop.value.code or 0), said.out + (said.err if stop.value.code else "")

    return command


@pytest.mark.usefixtures("forked_ranks")
def test_the_command_runs_one_variant(
    run: Run, several: Callable[[str], Several], tmp_path: Path
) -> None:
    made = several("flux")
    code, said = run(
        made.bundle, "--variant", "v4", "--json", "--outputs", tmp_path / "o.safetensors"
    )
    assert code == 0, said
    report = json.loads(said)
    assert report["variant"] == "v4"
    assert report["check"]["error"] <= 1e-5  # the dense model at that variant's sizes
    (output,) = load_file(tmp_path / "o.safetensors").values()
    assert output.shape == (1, 72, 16)
    save_file(made.inputs(batch=2), tmp_path / "i.safetensors")
    code, said = run(made.bundle, "--inputs", tmp_path / "i.safetensors")
    assert code == 0, said
    assert "variant    v3" in said


@pytest.mark.parametrize(
    ("by", "words"), [("torch", "no engine is at fault"), ("tensorrt", "--executor torch tells")]
)
def test_what_is_not_the_dense_models_is_told_by_what_ran(
    by: str, words: str, several: Callable[[str], Several], tmp_path: Path
) -> None:
    made, out = several("flux"), tmp_path / "out.safetensors"
    save_file({"sample": torch.zeros(1, 48, 16)}, out)
    manifest, _ = bundles.read(made.bundle)
    with pytest.raises(RunFailed, match="something else than the dense model") as failed:
        compare(manifest, {"bundle": str(made.bundle), "outputs": str(out)}, by)
    assert words in (failed.value.hint or "")


def test_what_tells_variants_apart_is_not_left_out(several: Callable[[str], Several]) -> None:
    made = several("two of qwen")
    views, given = views_of(bundles.read(made.bundle)[0]), made.inputs(rows=8, columns=6)
    assert fitting(views, given) == "v1"
    assert fitting(views, made.inputs()) == "v0"
    shapes = given.pop("img_shapes")
    with pytest.raises(UsageError, match="v0 and v1 have these inputs; they differ in img_shapes"):
        fitting(views, given)
    assert fitting(views, given, has_defaults=True) == "v0"
    assert fitting({"v1": views["v1"]}, given) == "v1"
    assert fitting(views, {**given, "img_shapes": [(9, 9, 9)] * len(shapes)}) == "v0"  # and told


def test_what_the_command_refuses(
    run: Run, several: Callable[[str], Several], tmp_path: Path
) -> None:
    made = several("flux")
    code, said = run(made.bundle, "--variant", "v9")
    assert code == 2
    assert "no variant 'v9'" in said
    save_file(made.inputs(rows=7), tmp_path / "i.safetensors")
    code, said = run(made.bundle, "--inputs", tmp_path / "i.safetensors")
    assert code == 2
    assert "the nearest is v0" in said
    code, said = run(made.bundle, "--inputs", tmp_path / "i.safetensors", "--variant", "v0")
    assert code == 2
    assert "has the shape [1, 56, 16]; the engines were built for [1, 48, 16]" in said
    weights = made.bundle / "weights.safetensors"
    before = weights.stat()
    code, said = run(made.bundle, "--outputs", weights)
    assert code == 2 and weights.stat() == before
    assert "it lies in the bundle" in said
    (tmp_path / "i.safetensors").write_bytes(b"")
    code, said = run(made.bundle, "--inputs", tmp_path / "i.safetensors")
    assert code == 2
    assert "--inputs: i.safetensors is empty" in said
