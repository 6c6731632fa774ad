import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from cp_convert.errors import WeightsError
from cp_convert.model.checkpoint import locate
from cp_convert.model.weights import Filled
from cp_convert.model.weights import load_weights as fill


def load_weights(module: nn.Module, path: Path, **options: Any) -> Filled:
    return fill(module, locate(path), path, **options)


def model() -> nn.Module:
    return nn.ModuleDict({"a": nn.Linear(3, 4), "b": nn.Linear(4, 2)})


def truth() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(t) for name, t in model().state_dict().items()}


def assert_loaded(module: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, tensors[name].to(tensor.dtype))


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """Two shards and the index that names them, as published models have."""
    parts = {"m-1.safetensors": ["a.weight", "b.bias"], "m-2.safetensors": ["a.bias", "b.weight"]}
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in parts.items() for name in names}
    index = folder / "m.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_a_file_an_index_and_a_folder_load_the_same(tmp_path: Path) -> None:
    tensors = truth()
    save_file(tensors, tmp_path / "one.safetensors")
    (tmp_path / "shards").mkdir()
    index = sharded(tmp_path / "shards", tensors)
    (tmp_path / "loose").mkdir()
    save_file(tensors, tmp_path / "loose" / "x.safetensors")
    for path in (tmp_path / "one.safetensors", index, tmp_path / "shards", tmp_path / "loose"):
        module = model()
        load_weights(module, path)
        assert_loaded(module, tensors)


def test_the_modules_dtype_is_kept(tmp_path: Path) -> None:
    tensors = truth()
    save_file(tensors, tmp_path / "one.safetensors")
    module = model().to(torch.bfloat16)
    load_weights(module, tmp_path / "one.safetensors")
    assert next(module.parameters()).dtype == torch.bfloat16
    assert_loaded(module, tensors)


def test_tied_tensors_may_stand_in_the_file_once(tmp_path: Path) -> None:
    module = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    module["b"].weight = module["a"].weight
    tensors = {n: torch.randn_like(t) for n, t in module.state_dict().items() if n != "b.weight"}
    save_file(tensors, tmp_path / "one.safetensors")
    load_weights(module, tmp_path / "one.safetensors")
    assert torch.equal(module["b"].weight, tensors["a.weight"])


def test_every_difference_is_listed_by_name_and_nothing_is_copied(tmp_path: Path) -> None:
    tensors = truth()
    del tensors["a.bias"]
    tensors["c.weight"] = torch.ones(1)
    tensors["b.bias"] = torch.ones(5)
    save_file(tensors, tmp_path / "one.safetensors")
    module = model()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    with pytest.raises(WeightsError) as caught:
        load_weights(module, tmp_path / "one.safetensors")
    for part in (
        "1 missing: a.bias",
        "1 unexpected: c.weight",
        "b.bias: [5] in the file, [2] in the",
    ):
        assert part in caught.value.message
    assert_loaded(module, before)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file(truth(), path)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(WeightsError, match="cannot be read as safetensors") as caught:
        load_weights(model(), path)
    assert "truncated" in (caught.value.hint or "")


def test_what_is_no_weights_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"pickle")
    (tmp_path / "bad.safetensors.index.json").write_text("[1]")
    (tmp_path / "empty").mkdir()
    (tmp_path / "many").mkdir()
    for name in ("p", "q"):
        save_file(truth(), tmp_path / "many" / f"{name}.safetensors")
    (tmp_path / "lost").mkdir()
    index = sharded(tmp_path / "lost", truth())
    (tmp_path / "lost" / "m-2.safetensors").unlink()
    for path, message in (
        (tmp_path / "absent.safetensors", "there is no"),
        (tmp_path / "x.bin", "no safetensors file"),
        (tmp_path / "bad.safetensors.index.json", "no safetensors index"),
        (tmp_path / "empty", "holds no .safetensors"),
        (tmp_path / "many", "stands in both"),
        (index, "m-2.safetensors is missing"),
    ):
        with pytest.raises(WeightsError, match=message):
            load_weights(model(), path)
