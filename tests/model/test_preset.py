"""Presets: that they are the published models, and that they convert."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils import _pytree as pytree

from benchmarks.checkpoints.modelopt import tensors_of, write
from cp_convert import instantiate as older_instantiate
from cp_convert import preset as older_preset
from cp_convert.backends import BACKENDS
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.engine.build import prepare
from cp_convert.engine.lower import lower
from cp_convert.errors import CannotTrace, ModelFileError, UsageError, WeightsError
from cp_convert.job import Job
from cp_convert.model import instantiate, preset
from cp_convert.model.load import load
from cp_convert.prove import Stages, flat_inputs, measure, prove, prove_networks
from cp_convert.sharding.shard import shard
from cp_convert.strategies import CONTROL, STRATEGIES
from cp_convert.strategies.rewrite import rewrite
from tests.conftest import axis_of, networks_of, table

NAMES = preset.names()


def read(name: str) -> preset.Preset:
    path = preset.path_of(name)
    assert path is not None
    return preset.read(path)


def job(model: Path, **options: object) -> Job:
    return Job(
        model=model, strategy="ulysses", world=2, out=Path("unused"), precision="fp32", **options
    )  # type: ignore[arg-type]


def test_the_models_that_were_promised_are_there() -> None:
    assert set(NAMES) >= {
        "flux.1-dev", "flux.1-schnell", "flux.2-dev", "wan2.1-1.3b", "wan2.1-14b", "cosmos3-nano",
        "qwen-image", "ltx-video", "sd3.5-large", "hunyuanvideo",
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_published_model(name: str) -> None:
    """At full size, without a byte of weights: as many parameters, and forward takes the inputs."""
    told = read(name)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        module = instantiate.model_class(told)(**told.config).eval()
        assert sum(p.numel() for p in module.parameters()) == told.parameters
        for resolution in told.resolutions:
            if resolution == told.resolution:
                inputs = instantiate.example_inputs(told, told.config, resolution, tiny=False)
                outputs = pytree.tree_leaves(module(**inputs))
    assert all(x.numel() for x in outputs if isinstance(x, Tensor))


OFTEN = ("flux.1-dev", "wan2.1-1.3b", "cosmos3-nano", "sd3.5-large")


@pytest.mark.parametrize(
    "name", [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_tiny_is_proven(name: str) -> None:
    """Program and networks, with the strategy that the preset proposes; the tokens it names."""
    prepare(BACKENDS["tensorrt-rtx"])
    told, path = read(name), preset.path_of(name)
    assert path is not None
    source = load(job(path, tiny=True))
    truth = measure(source.module, source.inputs)
    traced, _ = trace(source.module, source.inputs, {}, source.freeze)
    program, axis = decompose(traced, table()), axis_of(2)
    split = shard(program, axis)
    done, outcomes = rewrite(split, STRATEGIES[told.strategy], told.strategy, axis, table())
    control, _ = rewrite(split, CONTROL, "control", axis, table())
    sites = [(o.site, o.node) for o in outcomes]
    lowered = lower(done)
    stages = Stages(program, control, done, lowered, sites, axis)
    proof = prove(truth, source.inputs, stages)
    prove_networks(networks_of(lowered, 2), flat_inputs(lowered, source.inputs), proof, lowered)
    tokens = told.numbers(preset.TINY, {**told.config, **told.tiny})["tokens"]
    lengths = {
        segment.length for queries, _ in split.places.values() for segment in queries.segments
    }
    assert tokens in lengths


# --- published folders ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """A preset of a small FLUX, and its folder as diffusers publishes it, in several shards."""
    folder = tmp_path_factory.mktemp("published")
    told = read("flux.1-dev")
    small = replace_config(folder / "small.toml", {**told.config, **told.tiny})
    module = instantiate.randomised(instantiate.model_class(told)(**{**told.config, **told.tiny}))
    module.save_pretrained(folder / "pipe" / "transformer", max_shard_size="5MB")
    (folder / "pipe" / "model_index.json").write_text("{}")
    assert len(list((folder / "pipe" / "transformer").glob("*.safetensors"))) > 1
    return small, folder / "pipe", module


def replace_config(path: Path, config: dict[str, object]) -> Path:
    """FLUX.1 [dev]'s preset with another configuration."""
    source = preset.path_of("flux.1-dev")
    assert source is not None
    head, rest = source.read_text().split("[config]")
    lines = [f"{name} = {json.dumps(value)}" for name, value in config.items()]
    _, tail = rest.split("[tiny]")
    head = head.replace("11_901_408_320", "1")
    path.write_text("\n".join([head, "[config]", *lines, "", "[tiny]", tail]))
    return path


@pytest.mark.parametrize("inner", ["", "transformer"])
def test_a_published_folder_is_loaded(published: tuple[Path, Path, nn.Module], inner: str) -> None:
    path, folder, module = published
    source = load(job(path, weights=folder / inner, resolutions=("tiny",)))
    for name, parameter in source.module.named_parameters():
        assert torch.equal(parameter, module.get_parameter(name)), name


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("_class_name", "WanTransformer3DModel", "describes a WanTransformer3DModel"),
        ("num_layers", 3, "num_layers = 3 instead of 2"),
    ],
)
def test_the_folder_of_another_model_is_refused(
    published: tuple[Path, Path, nn.Module], tmp_path: Path, key: str, value: object, message: str
) -> None:
    path, folder, _ = published
    shutil.copytree(folder / "transformer", tmp_path / "other")
    file = tmp_path / "other" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), key: value}))
    with pytest.raises(WeightsError, match=message):
        load(job(path, weights=tmp_path / "other"))


def test_tiny_takes_no_weights(published: tuple[Path, Path, nn.Module]) -> None:
    path, folder, _ = published
    with pytest.raises(UsageError, match="--tiny has no published weights"):
        load(job(path, weights=folder, tiny=True))


def test_a_model_too_large_for_the_machine_is_told_before_it_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(8 * 2**30))
    path = preset.path_of("flux.1-dev")
    assert path is not None
    with pytest.raises(CannotTrace, match=r"11\.9 B parameters, 44 GiB .* 8 GiB are free"):
        load(job(path))


def test_a_folder_of_codes_needs_no_memory_for_their_numbers(
    published: tuple[Path, Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ModelOpt's folder, whose config.json has more in it than the class takes."""
    path, folder, module = published
    named = dict(module.named_modules())
    layers = [n for n, one in named.items() if isinstance(one, nn.Linear) and "blocks" in n]
    write(tmp_path / "codes", tensors_of(module, layers))
    places = (folder / "transformer" / "config.json", tmp_path / "codes" / "config.json")
    first, second = (json.loads(place.read_text()) for place in places)
    places[1].write_text(json.dumps(first | second))
    large = tmp_path / "large.toml"
    large.write_text(path.read_text().replace("parameters = 1\n", "parameters = 11_901_408_320\n"))
    memory = namedtuple("memory", "available")
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory(8 * 2**30))
    asked = replace(
        job(large, weights=tmp_path / "codes", weights_mode="external", proof="none"),
        precision="bf16",
    )
    source = load(asked)
    assert len(source.codes) == len(layers) > 10
    assert all(source.module.get_parameter(name).is_meta for name in source.codes)
    with pytest.raises(CannotTrace, match=r"22 GiB .* 8 GiB are free"):
        load(replace(asked, proof="auto"))


# --- what presets say -----------------------------------------------------------------------------


def test_sizes_are_whole_number_arithmetic() -> None:
    numbers = {"height": 1008, "columns": 63}
    assert preset.evaluate("(height // 16) * columns + 1 - 10 % 4", numbers) == 63 * 63 + 1 - 2
    assert preset.evaluate(7, numbers) == 7


@pytest.mark.parametrize("wrong", ["rows", "height / 16", "f(1)", "height.real", "2 ** 9", "'a'"])
def test_other_expressions_are_refused(wrong: str) -> None:
    with pytest.raises(UsageError, match="is not understood"):
        preset.evaluate(wrong, {"height": 1008})
    with pytest.raises(UsageError, match="no expression"):
        preset.evaluate("1 +", {})


def test_unknown_resolutions_name_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no resolution '4k'") as raised:
        read("wan2.1-14b").numbers("4k", {})
    assert raised.value.hint == "there are 720p-81f, 480p-81f."


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("title =", "titel =", "titel"),
        ("world = 8", 'world = "eight"', "Expected `int`"),
        ("[config]", "[config", "not valid TOML"),
    ],
)
def test_damaged_presets_are_named(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "mine.toml"
    source = preset.path_of("flux.1-dev")
    assert source is not None
    path.write_text(source.read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match=message):
        preset.read(path)


def test_a_configuration_that_the_class_does_not_take() -> None:
    told = read("flux.1-dev")
    with pytest.raises(ModelFileError, match=r"does not take this configuration.*'depth'"):
        instantiate.build(told, {**told.config, "depth": 3}, tiny=True, random=True)


def test_an_input_that_is_made_in_no_way() -> None:
    told = replace(
        job(Path("configs/flux.1-dev.toml"), tiny=True), resolutions=()
    )  # the job itself is fine
    assert told.name == "flux.1-dev-tiny"
    with pytest.raises(UsageError, match="does not say how the input x is made"):
        instantiate._input(preset.Input(), {}, "x")


def test_the_older_paths_of_model_files_go_on() -> None:
    """``from cp_convert.instantiate import randomised`` stands in model files of others."""
    for older, own in ((older_instantiate, instantiate), (older_preset, preset)):
        assert older.__all__
        assert all(getattr(older, name) is getattr(own, name) for name in older.__all__)
