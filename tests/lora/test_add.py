"""A set in a bundle: what is written, what follows from it, and what is refused."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from cp_convert import bundle as bundles
from cp_convert import runtime
from cp_convert.bundle.difference import differences
from cp_convert.bundle.folder import replace_manifest
from cp_convert.bundle.manifest import BundleFile, LoraSet
from cp_convert.cli import cli
from cp_convert.errors import ConvertError, DamagedBundle, OutputError, UsageError, WeightsError
from cp_convert.lora import write
from cp_convert.lora.add import add, remove
from cp_convert.lora.choose import chosen
from tests.lora.conftest import Made
from tests.lora.files import diffusers_names, factors, fused, linears
from tests.runtime.bundles import converted

Bundles = Callable[[str], Made]
JOINED = """
import torch
from torch import nn
from torch.nn import functional
from cp_convert import ContextParallelInput, ContextParallelOutput

cp_plan = {
    "enter": {"input": ContextParallelInput(split_dim=1)},
    "leave": ContextParallelOutput(gather_dim=1),
}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 64), nn.Linear(64, 8)
        self.q, self.k, self.v = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.one, self.two = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
        self.two.weight = self.one.weight

    def forward(self, x):
        joined = torch.cat([self.q.weight, self.k.weight, self.v.weight])
        qkv = functional.linear(self.enter(x), joined)
        q, k, v = qkv.unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(8 * q, k, v)
        return self.leave(self.two(self.one(mixed.transpose(1, 2).flatten(2)).sin()))

def build_model():
    torch.manual_seed(0)
    return Model()

def example_inputs():
    torch.manual_seed(1)
    return {"x": torch.randn(1, 16, 8)}
"""


@pytest.fixture(scope="session")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """For one rank: weights that are joined at conversion, and two names of one weight."""
    folder = tmp_path_factory.mktemp("joined")
    (folder / "model.py").write_text(JOINED)
    converted(folder / "model.py", folder / "out", "ulysses", 1, weights_mode="external")
    return Made(folder / "model.py", folder / "out")


def lora_of(made: Made, folder: Path, *names: str) -> tuple[Path, Any]:
    """A file that changes these layers, all of them where none is named."""
    given = factors(linears(made.model(), lambda name: not names or name in names), 1)
    return diffusers_names(given, folder / "a.safetensors"), given


def test_only_what_is_changed_is_stored_and_whole(made: Bundles, tmp_path: Path) -> None:
    bundle = made("flux").copy(tmp_path)
    name = "transformer_blocks.0.attn.to_q"
    file, given = lora_of(made("flux"), tmp_path, name)
    told, others = add(bundle, file, scale=0.5, name="style")
    assert (told.name, told.scale, told.kinds, others) == ("style", 0.5, ["lora"], 0)
    stored = load_file(bundle / "lora" / "style.safetensors")
    model = fused(made("flux").model(), [(given, 0.5)])
    assert list(stored) == [f"{name}.weight"]
    assert torch.allclose(stored[f"{name}.weight"], model.get_submodule(name).weight, atol=1e-6)
    assert sorted(p.name for p in (bundle / "lora").rglob("*")) == [
        "factors", "style.safetensors", "style.safetensors",
    ]  # fmt: skip
    assert not [check for check in bundles.verify(bundle) if check.problem]
    assert bundles.read(bundle)[0].lora == [told]


def test_a_removed_set_leaves_nothing(made: Bundles, tmp_path: Path) -> None:
    bundle = made("flux").copy(tmp_path)
    file, _ = lora_of(made("flux"), tmp_path)
    add(bundle, file)
    before = bundles.read(bundle)[0]
    remove(bundle, "a")
    assert not [path for path in (bundle / "lora").rglob("*") if path.is_file()]
    found = differences(before, bundles.read(bundle)[0])
    assert [(one.part, one.name, one.after) for one in found] == [("lora", "a", None)]
    with pytest.raises(UsageError, match="no LoRA set 'a'"):
        remove(bundle, "a")


def test_constants_follow(joined: Made, tmp_path: Path) -> None:
    bundle = joined.copy(tmp_path)
    file, given = lora_of(joined, tmp_path, "k", "leave")
    told, _ = add(bundle, file)
    model = fused(joined.model(), [(given, 1.0)])
    weights = {one.name: one for one in told.weights}
    constant = next(name for name in weights if name.startswith("constants."))
    stored = load_file(bundle / told.file.file)
    wanted = torch.cat([model.q.weight, model.k.weight, model.v.weight])
    assert torch.allclose(stored[constant].reshape(-1).sort().values,
                          wanted.reshape(-1).sort().values, atol=1e-6)  # fmt: skip
    with runtime.open(bundle, executor="torch", device="cpu", lora="a") as opened, torch.no_grad():
        assert torch.allclose(opened(**joined.inputs()), model(**joined.inputs()), atol=1e-5)
        opened.use_lora(None)
        assert torch.allclose(
            opened(**joined.inputs()), joined.model()(**joined.inputs()), atol=1e-5
        )


def test_a_constant_that_does_not_follow_is_not_stored(joined: Made, tmp_path: Path) -> None:
    bundle = joined.copy(tmp_path)
    told, _ = add(bundle, lora_of(joined, tmp_path, "leave")[0])
    assert [one.name for one in told.weights] == ["leave.weight"]


def without_program(bundle: Path) -> None:
    manifest, _ = bundles.read(bundle)
    replace_manifest(bundle, msgspec.structs.replace(manifest, program=None))


def embedded(bundle: Path) -> None:
    manifest, _ = bundles.read(bundle)
    replace_manifest(bundle, msgspec.structs.replace(manifest, weights_mode="embedded", weights=[]))


def other_weights(bundle: Path) -> None:
    file = bundle / "weights.safetensors"
    data = bytearray(file.read_bytes())
    place = next(w.offset for w in bundles.read(bundle)[0].weights if w.name == "leave.weight")
    data[place : place + 4] = b"\0\0\0\0"
    file.write_bytes(data)


REFUSED: dict[str, tuple[Any, dict[str, Any], type[ConvertError], str]] = {
    "embedded": (embedded, {}, UsageError, "inside its engines, where a LoRA cannot reach"),
    "program": (without_program, {}, UsageError, r"constants\.cat\w* was computed from weights"),
    "slash": (None, {"name": "a/b"}, UsageError, r"'a/b' is no name of a set"),
    "up": (None, {"name": ".."}, UsageError, r"'\.\.' is no name of a set"),
    "long": (None, {"name": "a" * 101}, UsageError, r"is no name of a set: up to 100"),
    "scale": (None, {"scale": float("nan")}, UsageError, "nan: not a finite number"),
    "weights": (other_weights, {}, DamagedBundle, "holds other numbers for"),
}


@pytest.mark.parametrize(("spoil", "options", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_written(
    spoil: Any, options: dict[str, Any], kind: type[ConvertError], message: str, joined: Made,
    tmp_path: Path,
) -> None:  # fmt: skip
    bundle = joined.copy(tmp_path)
    if spoil is not None:
        spoil(bundle)
    before = {path: path.stat().st_mtime_ns for path in bundle.rglob("*") if path.is_file()}
    with pytest.raises(kind, match=message) as refused:
        add(bundle, lora_of(joined, tmp_path, "q", "leave")[0], **options)
    assert refused.value.hint
    assert before == {p: p.stat().st_mtime_ns for p in bundle.rglob("*") if p.is_file()}


def test_a_weight_that_its_type_cannot_hold(made: Bundles, tmp_path: Path) -> None:
    bundle = made("flux").copy(tmp_path)
    file, _ = lora_of(made("flux"), tmp_path)
    with pytest.raises(WeightsError, match="holds numbers that float32 cannot hold"):
        add(bundle, file, scale=1e39)
    assert not [path for path in (bundle / "lora").rglob("*") if path.is_file()]


def test_two_names_of_one_weight_are_not_changed_twice(joined: Made, tmp_path: Path) -> None:
    tensors: dict[str, Tensor] = {}
    for name in ("one", "two"):
        tensors |= {f"{name}.lora_A.weight": torch.ones(1, 64),
                    f"{name}.lora_B.weight": torch.ones(64, 1)}  # fmt: skip
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UsageError, match=r"one\.weight and two\.weight hold the same numbers"):
        add(joined.copy(tmp_path), tmp_path / "a.safetensors")


def test_a_name_that_is_taken(made: Bundles, tmp_path: Path) -> None:
    bundle = made("flux").copy(tmp_path)
    file, _ = lora_of(made("flux"), tmp_path)
    add(bundle, file)
    before = (bundle / "manifest.json").read_bytes()
    for name in ("a", "A"):
        with pytest.raises(UsageError, match="already has a LoRA set a"):
            add(bundle, file, name=name)
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_failure_half_way_leaves_what_was_there(
    made: Bundles, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = made("flux").copy(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "write_factors", full)
    with pytest.raises(OutputError, match="No space left") as refused:
        add(bundle, lora_of(made("flux"), tmp_path)[0])
    assert "--out" not in (refused.value.hint or "--out")
    assert bundles.read(bundle)[0].lora == []
    assert not list((bundle / "lora").iterdir())


def test_a_set_whose_file_changed_is_noticed(made: Bundles, tmp_path: Path) -> None:
    bundle = made("flux").copy(tmp_path)
    told, _ = add(bundle, lora_of(made("flux"), tmp_path)[0])
    weight = told.weights[0]
    for own, offset, asked in (
        (told.file, weight.offset, {"a": None}), (told.factors, told.factors.bytes - 4, {"a": 0.1}),
    ):  # fmt: skip
        before = (bundle / own.file).read_bytes()
        (bundle / own.file).write_bytes(before[:offset] + b"\1\2\3\4" + before[offset + 4 :])
        found = {check.subject: check.problem for check in bundles.verify(bundle) if check.problem}
        assert found == {own.file: "SHA-256 differs from the manifest's"}
        single = msgspec.structs.replace(bundles.read(bundle)[0], world=1)
        with pytest.raises(DamagedBundle, match=r"other numbers|SHA-256 differs"):
            _opened(bundle, single, asked)
        (bundle / own.file).write_bytes(before)
    shutil.rmtree(bundle / "lora")
    with pytest.raises(DamagedBundle, match="cannot be read: No such file"):
        _opened(bundle, single, {"a": None})


def _opened(bundle: Path, manifest: Any, asked: Any) -> None:
    """As one rank of the bundle opens its sets."""
    from cp_convert.runtime.lora import Sets

    bound = {one.name: torch.zeros(one.shape) for one in manifest.weights}
    Sets(manifest, bundle, bound, None, verify=True, told=lambda _: None).tensors(asked)


def test_dora_is_used_alone(made: Bundles, tmp_path: Path) -> None:
    bundle, layer = made("flux").copy(tmp_path), "single_transformer_blocks.0.proj_mlp"
    weight = made("flux").model().get_submodule(layer).weight
    assert isinstance(weight, nn.Parameter)
    tensors = {
        f"transformer.{layer}.lora_A.weight": torch.randn(1, weight.shape[1]),
        f"transformer.{layer}.lora_B.weight": torch.randn(weight.shape[0], 1),
    }
    save_file(tensors, tmp_path / "plain.safetensors")
    magnitude = {f"transformer.{layer}.lora_magnitude_vector": torch.full(weight.shape[:1], 2.0)}
    save_file(tensors | magnitude, tmp_path / "dora.safetensors")
    told, _ = add(bundle, tmp_path / "dora.safetensors")
    add(bundle, tmp_path / "plain.safetensors")
    assert told.kinds == ["dora", "lora"]
    rows = load_file(bundle / told.file.file)[f"{layer}.weight"].norm(dim=1)
    assert torch.allclose(rows, torch.full_like(rows, 2.0))
    manifest, _ = bundles.read(bundle)
    assert chosen(manifest, {"dora": 0.5}) == {"dora": 0.5}
    with pytest.raises(UsageError, match="dora is a DoRA, which does not add to plain"):
        chosen(manifest, ["plain", "dora"])


@pytest.mark.parametrize(
    "asked", [5, {"a": "much"}, {"a": True}, {"a": float("nan")}, {3: None, "a": 1.0}, ["a", 3]]
)
def test_what_is_no_set_is_refused_before_ranks_meet(asked: Any, made: Bundles) -> None:
    """Whoever fails otherwise fails alone, and the other ranks wait for it."""
    told = LoraSet("a", "a", "", ["lora"], 1.0, BundleFile("a", 1, ""), BundleFile("a", 1, ""), [])
    manifest = msgspec.structs.replace(bundles.read(made("flux").bundle)[0], lora=[told])
    with pytest.raises(UsageError, match=r"no LoRA set|no finite number"):
        chosen(manifest, asked)


def run(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(arg) for arg in args])
    if isinstance(result.exception, ConvertError):
        return result.exception.exit_code, result.exception.message
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


def test_the_command(made: Bundles, tmp_path: Path) -> None:
    bundle = made("flux").copy(tmp_path)
    file, given = lora_of(made("flux"), tmp_path)
    code, said = run("lora", bundle, file, "--scale", "0.8", "--as", "style", "--json")
    told = msgspec.json.decode(said)
    assert (code, told["set"]["name"], told["set"]["scale"]) == (0, "style", 0.8)
    assert len(told["set"]["weights"]) == len(given)
    assert run("inspect", bundle)[1].count("style") == 1
    page = tmp_path / "page.html"
    assert run("inspect", bundle, "--html", page)[0] == 0
    assert "LoRA sets" in page.read_text()
    assert run("run", bundle, "--lora", "stile")[1] == "the bundle has no LoRA set 'stile'."
    assert run("run", bundle, "--lora", "style=x") == (2, "--lora style=x: 'x' is no number.")
    assert run("run", bundle, "--lora", "style", "--lora", "style=1")[0] == 2
    assert run("lora", bundle)[0] == run("lora", bundle, file, "--remove", "x")[0] == 2
    assert run("lora", bundle, "--remove", "style")[0] == 0
