"""One model in several shapes: what is made, kept, found again, told and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cp_convert import bundle as bundles
from cp_convert.bundle.variants import all_variants, joined, names_of, variant_of
from cp_convert.errors import UsageError
from cp_convert.job import Job
from cp_convert.model import preset
from cp_convert.model.load import load

Write = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]
SIZES = '\nvariants = {"short": {}, "long": {"tokens": 24}, "pair": {"batch": 2}}\n'
SIZED = (
    (
        "def example_inputs():",
        "def example_inputs(tokens=16, batch=1):",
    ),
    ("torch.randn(1, 16, 8)", "torch.randn(batch, tokens, 8)"),
)


@pytest.fixture
def sized(model_file: Write) -> Callable[[str], Path]:
    """A model file whose inputs have a size, and what else stands in it."""

    def write(more: str = SIZES) -> Path:
        path = model_file(*SIZED)
        path.write_text(path.read_text() + more)
        return path

    return write


BASE = ("-s", "ulysses", "-w", 2, "--weights-mode", "external", "-p", "fp32", "-q")


def test_a_bundle_of_variants(run: Run, sized: Callable[[], Path], tmp_path: Path) -> None:
    out, model = tmp_path / "out", sized()
    code, _, said = run("convert", model, *BASE, "--proof", "network", "-o", out,
                        "--summary", tmp_path / "s.xml")  # fmt: skip
    assert code == 0, said
    manifest, _ = bundles.read(out)
    assert names_of(manifest) == ["short", "long", "pair"]
    shapes = [one.io[0].shape for one in all_variants(manifest)]
    assert shapes == [[1, 16, 8], [1, 24, 8], [2, 16, 8]]
    for one in all_variants(manifest):
        assert one.proof.level == "network"
        assert max(e.max for e in one.proof.network.algebra) <= 1e-5  # type: ignore[union-attr]
        assert [w.name for w in one.weights] == [w.name for w in manifest.weights]
        assert one.attention[0].global_query == one.io[0].shape[1]
    assert not any(one.weights or one.unused for one in manifest.variants)
    files = {engine.file for one in all_variants(manifest) for engine in one.engines}
    assert len(files) == 6
    assert len({(out / file).stat().st_ino for file in files}) == 3  # one engine for both ranks
    assert not [check for check in bundles.verify(out) if check.problem]
    assert joined(all_variants(manifest)) == manifest
    assert (tmp_path / "s.xml").read_text().count("verdict on ") == 3
    _found_again(run, model, out)
    _shown(run, out)
    engine = out / "variants/long/rank1.engine"
    engine.write_bytes(engine.read_bytes() + b" ")
    code, _, said = run("verify", out)
    assert code == 6
    assert "variants/long/rank1.engine" in said


def _found_again(run: Run, model: Path, out: Path) -> None:
    """The same command is recalled; a variant less, or another size, is not the same."""
    code, told, said = run("convert", model, *BASE, "--proof", "network", "-o", out, "--force",
                           "--json")  # fmt: skip
    assert code == 0, said
    manifest = json.loads(told)["manifest"]
    assert "recall" in manifest["timings"] and "build" not in manifest["timings"]
    for one in (manifest, *manifest["variants"]):
        assert one["proof"]["recalled"] and one["engines"][0]["recalled"]
    assert not [check for check in bundles.verify(out) if check.problem]
    code, told, said = run("convert", model, *BASE, "--proof", "network", "-o", out, "--force",
                           "--json", "--variant", "long")  # fmt: skip
    assert code == 0, said
    manifest = json.loads(told)["manifest"]
    assert not manifest["variants"] and manifest["request"]["variant"] == "long"
    assert "build" in manifest["timings"]  # but the engine was there already
    assert manifest["engines"][0]["recalled"] and not manifest["proof"]["recalled"]
    run("convert", model, *BASE, "--proof", "network", "-o", out, "--force")


def _shown(run: Run, out: Path) -> None:
    code, told, said = run("inspect", out, "--html", out.with_name("page.html"))
    assert code == 0, said
    assert "x 1 x 24 x 8" in told and "--variant NAME" in told
    page = out.with_name("page.html").read_text()
    assert page.count("<details>") == 3 and "in all 3 variants" in page
    code, told, said = run("inspect", out, "--variant", "pair")
    assert code == 0 and "variants/pair/rank0.engine" in told
    code, told, _ = run("diff", out, out)
    assert code == 0


def test_what_differs_in_a_variant_alone(
    run: Run, sized: Callable[[str], Path], tmp_path: Path
) -> None:
    for name, tokens in (("a", 24), ("b", 32)):
        sizes = f'\nvariants = {{"short": {{}}, "long": {{"tokens": {tokens}}}}}\n'
        code, _, said = run("convert", sized(sizes), *BASE, "--no-proof", "-o", tmp_path / name)
        assert code == 0, said
    code, told, _ = run("diff", "a", "b", "--json")
    assert code == 1
    found = {(one["part"], one["name"]): one for one in json.loads(told)["differences"]}
    assert found["inputs", "long: input x"]["after"] == "float32 [1, 32, 8]"
    assert ("inputs", "input x") not in found
    with pytest.raises(UsageError, match="the bundle has 2 variants: short, long"):
        variant_of(bundles.read(tmp_path / "a")[0], None)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("variants = []", "variants is [], not a dict of dicts"),
        ("variants = {'a': 1}", "not a dict of dicts"),
        ("variants = {'a b': {}}", "'a b' is no name"),
        ("variants = {'../x': {}}", "'../x' is no name"),
        (f"variants = {{{'a' * 101!r}: {{}}}}", "is no name"),
        ("variants = {'a': {3: 4}}", "'a' has 3 where an argument of"),
        ("variants = {'a': {}, 'A': {}}", "'a' is there twice, but for capitals"),
        ("variants = {'a': {}, 'b': {'tokens': 16}}", "a and b have inputs of equal shapes"),
        ("variants = {'a': {}, 'b': {'width': 16}}", "example_inputs(width=16) failed with Type"),
        ("variants = {'a': {'tokens': 0}}", "(tokens=0) gives an empty tensor for 'x'"),
        (
            (
                "variants = {'a': {}, 'b': {'tokens': 8}}\n"
                "was = example_inputs\n"
                "def example_inputs(tokens=16):\n"
                "    return was(tokens) | ({} if tokens == 16 else {'y': 1})"
            ),
            "a and b do not take the same arguments: only one has y",
        ),
    ],
)
def test_variants_that_are_none(
    run: Run, sized: Callable[[str], Path], more: str, words: str, tmp_path: Path
) -> None:
    code, _, said = run("convert", sized(f"\n{more}\n"), *BASE, "-o", tmp_path / "out")
    assert code == 2, said
    assert words in said.replace("\n", " ")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("odd", "options", "words"),
    [
        ({"tokens": 1}, [], "Cannot shard the model: variant odd: 1 tokens along dimension 1"),
        ({"channels": 7}, [], "Cannot trace the model: variant odd: RuntimeError: "),
        ({}, ["--dynamic", "tokens=1:9"], "at tokens=2 the last of 2 ranks holds padding alone"),
        ({}, ["--dynamic", "channels=9:24"], "variant channels-24: RuntimeError"),
    ],
)
def test_what_fails_is_told_with_the_variant(
    run: Run, model_file: Write, odd: object, options: list[str], words: str, tmp_path: Path
) -> None:
    path = model_file(
        ("def example_inputs():", "def example_inputs(tokens=16, channels=8):"),
        ("torch.randn(1, 16, 8)", "torch.randn(1, tokens, channels)"),
    )
    path.write_text(path.read_text() + f"\nvariants = {{'a': {{}}, 'odd': {odd}}}\n")
    code, _, said = run("convert", path, *BASE, "--no-proof", *options, "-o", tmp_path / "out")
    assert code == 3, said
    assert words in said


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--variant", "wide"], "--variant wide: "),
        (["--variant", "short", "--variant", "short"], "--variant short is given twice"),
        (["--batch", "2"], "--batch and --text"),
    ],
)
def test_options_of_model_files(
    run: Run, sized: Callable[[], Path], options: list[str], words: str, tmp_path: Path
) -> None:
    code, _, said = run("convert", sized(), *BASE, *options, "-o", tmp_path / "out")
    assert code == 2, said
    assert words in said
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", ""], "is no list of numbers; write 1,2,4"),
        (["--batch", "1,,2"], "is no list of numbers"),
        (["--batch", "1,-2"], "is no list of numbers"),
        (["--batch", "0"], "--batch 0: at least 1 is needed"),
        (["--batch", "2,1,2"], "--batch 2 is given twice"),
        (["--text", "32,32"], "--text 32 is given twice"),
        (["--resolution", "1024x1024", "--resolution", "1024x1024"], "is given twice"),
        (["--resolution", "1024x1024", "--resolution", "4k"], "no resolution '4k'"),
        (["--variant", "a"], "--variant is for model files"),
    ],
)
def test_options_of_presets(run: Run, options: list[str], words: str, tmp_path: Path) -> None:
    code, _, said = run("convert", "flux.1-dev", "--tiny", *options, "-o", tmp_path / "out")
    assert code == 2, said
    assert words in said
    assert not list(tmp_path.glob("*out*"))


WRONG = """
right = build_model
def build_model():
    model = right()
    forward = type(model).forward
    def wrong(self, x):
        calls.append(1)
        return forward(self, x) + (len(calls) if x.shape[1] == 24 else 0)
    type(model).forward = wrong
    return model
calls = []
"""


@pytest.mark.parametrize("proof", ["program", "network"])
def test_a_variant_that_fails_leaves_nothing(
    proof: str, run: Run, sized: Callable[[str], Path], tmp_path: Path
) -> None:
    """Its forward returns something else every time that it is called, at one size alone."""
    code, _, said = run(
        "convert", sized(SIZES + WRONG), *BASE, "--proof", proof, "-o", tmp_path / "out"
    )
    assert code == 4, said
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize("name", [one for one in preset.names() if one != "cosmos3-nano"])
def test_presets_in_several_shapes(name: str) -> None:
    path = preset.path_of(name)
    assert path is not None
    told = preset.read(path)
    source = load(
        Job(
            model=path, strategy="ulysses", world=2, out=Path("unused"), precision="fp32",
            tiny=True, batches=(1, 2), texts=(16, 32),
            resolutions=tuple(one for one in told.resolutions if one != preset.TINY)[:1],
        )
    )  # fmt: skip
    variants = (source, *source.others)
    names = [f"{source.variant.resolution}-b{b}-t{t}" for b in (1, 2) for t in (16, 32)]
    assert [one.variant.name for one in variants] == names
    shared = dict(source.module.named_parameters())
    for one in variants:
        text = one.inputs["encoder_hidden_states"]
        assert list(text.shape[:2]) == [one.variant.batch, one.variant.text]
        with torch.no_grad():
            (out,) = one.module(**one.inputs, return_dict=False)
        assert out.shape[0] == one.variant.batch
        own = dict(one.module.named_parameters())
        assert all(parameter is shared[path] for path, parameter in own.items())
    assert len({id(one.module) for one in variants}) == 4


def test_tiny_keeps_what_tells_resolutions_apart() -> None:
    told = preset.read(Path("configs/flux.1-dev.toml"))
    numbers = {one: told.numbers(one, told.config, tiny=True) for one in told.resolutions}
    assert numbers["1024x1024"]["tokens"] == 16 * 16 == numbers["tiny"]["tokens"]
    assert numbers["1360x768"]["tokens"] == 12 * 21
    assert numbers["2048x2048"]["tokens"] == 32 * 32
    assert numbers["1360x768"]["text_tokens"] == 32


def test_a_preset_without_a_batch_says_so() -> None:
    told = preset.read(Path("configs/cosmos3-nano.toml"))
    with pytest.raises(UsageError, match="inputs of this preset have no batch"):
        told.numbers(told.resolution, told.config, batch=2)
