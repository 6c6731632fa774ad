"""Which files an index, a folder or a link may lead to (docs/adr/0014)."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cp_convert.errors import WeightsError
from cp_convert.model.checkpoint import locate, transformer_folder

SHA = "ab" * 32


def saved(path: Path, *names: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: torch.ones(2) for name in names or ("a",)}, path)
    return path


def index(folder: Path, **places: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "m.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": places}))
    return file


@pytest.mark.parametrize(
    "place", ["../x.safetensors", "sub/../../x.safetensors", "/x.safetensors", "C:\\x", "a\\b", ""]
)
def test_an_index_stays_in_its_folder(place: str, tmp_path: Path) -> None:
    saved(tmp_path / "x.safetensors")
    with pytest.raises(WeightsError, match=r"places a in .*no path within its folder"):
        locate(index(tmp_path / "model", a=place))


def test_a_shard_may_lie_deeper(tmp_path: Path) -> None:
    saved(tmp_path / "parts" / "1.safetensors")
    assert set(locate(index(tmp_path, a="parts/1.safetensors"))) == {"a"}


def test_a_name_that_the_shard_lacks_is_named(tmp_path: Path) -> None:
    saved(tmp_path / "1.safetensors", "a")
    file = index(tmp_path, a="1.safetensors", b="1.safetensors")
    with pytest.raises(WeightsError, match=r"places b in 1\.safetensors, which lacks it"):
        locate(file)


@pytest.mark.parametrize("by_index", [True, False])
@pytest.mark.parametrize("target", ["elsewhere/x.safetensors", f"elsewhere/blobs/{SHA}"])
def test_a_link_out_of_the_folder_is_refused(target: str, by_index: bool, tmp_path: Path) -> None:
    real, folder = saved(tmp_path / target), tmp_path / "model"
    folder.mkdir()
    (folder / "x.safetensors").symlink_to(real)
    if by_index:
        index(folder, a="x.safetensors")
    with pytest.raises(WeightsError, match=r"x\.safetensors is a link that leads out of"):
        locate(folder)
    assert locate(folder / "x.safetensors")  # named by the user


def test_a_link_within_the_folder_is_fine(tmp_path: Path) -> None:
    saved(tmp_path / "parts" / "1.safetensors")
    (tmp_path / "x.safetensors").symlink_to("parts/1.safetensors")
    assert set(locate(tmp_path)) == {"a"}
    (tmp_path / "again").symlink_to(tmp_path)
    assert set(locate(tmp_path / "again")) == {"a"}


@pytest.mark.parametrize("deep", [True, False])
def test_a_hubs_cache_is_made_of_links(deep: bool, tmp_path: Path) -> None:
    blobs = tmp_path / "models--owner--name" / "blobs"
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1234" / "transformer"
    snapshot = snapshot if deep else tmp_path / "downloaded"
    snapshot.mkdir(parents=True)
    saved(blobs / SHA)
    (snapshot / "x.safetensors").symlink_to(os.path.relpath(blobs / SHA, snapshot))
    (blobs / ("cd" * 20)).write_text(json.dumps({"weight_map": {"a": "x.safetensors"}}))
    (snapshot / "m.safetensors.index.json").symlink_to(blobs / ("cd" * 20))
    found = locate(snapshot)
    assert found["a"].file.resolve() == blobs / SHA


def test_a_broken_or_circular_link_is_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").symlink_to("absent")
    with pytest.raises(WeightsError, match="is missing"):
        locate(tmp_path)
    (tmp_path / "x.safetensors").unlink()
    (tmp_path / "x.safetensors").symlink_to("x.safetensors")
    with pytest.raises(WeightsError):
        locate(tmp_path)


def test_a_transformers_folder_is_entered(tmp_path: Path) -> None:
    inner = saved(tmp_path / "transformer" / "x.safetensors").parent
    assert transformer_folder(tmp_path) == inner
    assert transformer_folder(inner) == inner
    saved(tmp_path / "whole.safetensors")
    assert transformer_folder(tmp_path) == tmp_path  # which of them is meant is not known
    (tmp_path / "model_index.json").write_text("{}")
    assert transformer_folder(tmp_path) == inner
