"""The file that built a bundle's model is found from any folder, or it is said what to do."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from cp_convert import bundle as bundles
from cp_convert.bundle.manifest import Manifest
from cp_convert.cli.main import cli
from cp_convert.errors import UsageError
from cp_convert.files import sha256
from cp_convert.model.preset import path_of
from cp_convert.runtime.original import Original, check_named, original_of
from tests.bundle.test_folder import written


def bundle_of(out: Path, source: Path | str, digest: str, weights: str | None = None) -> Manifest:
    manifest, _ = bundles.read(written(out))
    model = replace(manifest.model, source=str(source), source_sha256=digest, weights=weights)
    return replace(manifest, model=model)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """``examples/model.py`` of a folder, below which bundles are written."""
    path = tmp_path / "work" / "examples" / "model.py"
    path.parent.mkdir(parents=True)
    path.write_text("x = 1")
    return path


def test_what_was_typed_relative_is_found_above_the_bundle(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, elsewhere = tmp_path / "work" / "bundles" / "one", tmp_path / "elsewhere"
    manifest = bundle_of(out, "examples/model.py", sha256(model), "weights/a.safetensors")
    elsewhere.mkdir()
    (elsewhere / "examples").mkdir()
    (elsewhere / "examples" / "model.py").write_text("x = 2")  # of the same name, and another
    monkeypatch.chdir(elsewhere)
    reason = original_of(manifest, out, Original())
    assert isinstance(reason, str)
    assert reason == (
        "the weights: weights/a.safetensors is neither here nor above the bundle; --weights names "
        "them"
    )
    weights = tmp_path / "work" / "weights" / "a.safetensors"
    weights.parent.mkdir()
    weights.touch()
    assert original_of(manifest, out, Original()) == Original(model, weights)
    own = Original(weights=elsewhere)
    assert original_of(manifest, out, own) == Original(model, elsewhere)
    monkeypatch.chdir(tmp_path / "work")  # where it was typed
    found = original_of(manifest, out, Original())
    assert isinstance(found, Original) and found.model is not None
    assert found.model.resolve() == model


def test_what_is_not_found_is_said_with_the_way_out(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "far" / "one"
    manifest = bundle_of(out, "examples/model.py", sha256(model))
    told = (
        "examples/model.py is neither here nor above the bundle; --model names the file as it was"
    )
    assert original_of(manifest, out, Original()) == told
    assert original_of(manifest, out, Original(model)) == Original(model)
    manifest = bundle_of(tmp_path / "work" / "two", "examples/model.py", "1" * 64)
    told = "examples/model.py has changed; --model names the file as it was"
    assert original_of(manifest, tmp_path / "work" / "two", Original()) == told
    manifest = bundle_of(out.parent / "three", "/nowhere/model.py", "1" * 64)
    assert "/nowhere/model.py is not here; --model" in str(original_of(manifest, out, Original()))


def test_a_preset_of_another_installation_is_this_ones(tmp_path: Path) -> None:
    shipped = path_of("flux.1-dev")
    assert shipped is not None
    theirs = f"/elsewhere/cp_convert/configs/{shipped.name}"
    manifest = bundle_of(tmp_path / "out", theirs, sha256(shipped))
    assert original_of(manifest, tmp_path / "out", Original()) == Original(shipped)
    manifest = bundle_of(tmp_path / "other", theirs, "1" * 64)
    assert isinstance(original_of(manifest, tmp_path / "out", Original()), str)


def test_what_is_named_is_looked_at_before_any_rank_starts(model: Path, tmp_path: Path) -> None:
    manifest = bundle_of(tmp_path / "out", model, sha256(model))
    check_named(Original(model), manifest)
    for named, told in (
        (Original(tmp_path / "none.py"), "--model: there is no file"),
        (Original(weights=tmp_path), "made with the model file's own numbers"),
    ):
        with pytest.raises(UsageError, match=told):
            check_named(named, manifest)
    manifest = bundle_of(tmp_path / "out", model, sha256(model), "a")
    with pytest.raises(UsageError, match="--weights: there is no"):
        check_named(Original(weights=tmp_path / "none"), manifest)
    ended = CliRunner().invoke(cli, ["run", str(tmp_path / "out"), "--model", str(model)])
    assert isinstance(ended.exception, UsageError)
    assert "the bundle was made from another file, x.py" in ended.exception.message
