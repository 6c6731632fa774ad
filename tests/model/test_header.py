"""Bad headers and indices: always one WeightsError, never a traceback or a wrong load."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cp_convert.errors import WeightsError
from cp_convert.ir.tensors import bytes_of, tensor_at
from cp_convert.model.checkpoint import locate
from cp_convert.model.header import read_header

MANY = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
NUMBERS = bytes(range(24))
GOOD = {
    "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [16, 24]},
}


def written(path: Path, header: object, numbers: bytes = NUMBERS) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + numbers)
    return path


def test_a_good_header_is_read(tmp_path: Path) -> None:
    path = written(tmp_path / "x.safetensors", {**GOOD, "__metadata__": {"format": "pt"}})
    assert [(n, at.shape, at.size) for n, at in locate(path).items()] == [
        ("a", (2, 2), 16),
        ("b", (4,), 8),
    ]


def entry(**changes: Any) -> dict[str, Any]:
    return {**GOOD, "b": {**GOOD["b"], **changes}}


BAD_HEADERS: dict[str, tuple[object, str]] = {
    "twice": (b'{"a":1,"a":2}', "names a twice"),
    "twice within": (b'{"a":{"dtype":"F32","dtype":"I8"}}', "names dtype twice"),
    "a list": ([], "a list in JSON"),
    "no JSON": (b"{not json", "its header is wrong"),
    "deep": (b"{" + b'"a":[' * 50_000, "its header is wrong"),
    "not UTF-8": (b'{"\xff":1}', "its header is wrong"),
    "unknown type": (entry(dtype="F23"), "the type of b is 'F23'"),
    "no type": (entry(dtype=None), "the type of b is None"),
    "overlap": (entry(data_offsets=[12, 20]), "the numbers of b overlap those of a"),
    "the same place": (entry(shape=[8], data_offsets=[0, 16]), "overlap"),
    "a hole": ({**GOOD, "b": {**GOOD["b"], "data_offsets": [18, 26]}}, "belong to none"),
    "behind the end": (entry(shape=[6], data_offsets=[16, 28]), "ends after"),
    "before the end": ({"a": GOOD["a"]}, "belong to no tensor"),
    "another size": (entry(shape=[5]), "takes 10 bytes and is given 8"),
    "backwards": (entry(data_offsets=[24, 16]), "is given -8"),
    "negative": (entry(data_offsets=[-8, 0]), "at the offsets"),
    "negative shape": (entry(shape=[-2, -2]), "has the shape"),
    "a true shape": (entry(shape=[True, 4]), "has the shape"),
    "a fraction": (entry(shape=[4.0]), "has the shape"),
    "three offsets": (entry(data_offsets=[16, 20, 24]), "at the offsets"),
    "no entry": ({**GOOD, "b": "x"}, "the type of b is None"),
    "huge": (entry(shape=[1 << 62, 1 << 62], data_offsets=[16, 24]), "takes"),
    "nothing": ({}, "belong to no tensor"),
}


@pytest.mark.parametrize("kind", BAD_HEADERS)
def test_a_bad_header_is_said_for_what_it_is(kind: str, tmp_path: Path) -> None:
    header, message = BAD_HEADERS[kind]
    with pytest.raises(WeightsError) as caught:
        locate(written(tmp_path / "x.safetensors", header))
    assert message in caught.value.message
    assert "x.safetensors" in caught.value.message


OTHER_FILES = {
    b"": "is empty",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n": "a git-lfs pointer",
    b"\n<!DOCTYPE html><title>404</title>": "a web page",
    b"<html>Sign in</html>": "a web page",
    b"PK\x03\x04 archive/data.pkl ": "PyTorch's pickle",
    b"\x80\x02}q\x00. and more": "PyTorch's pickle",
    b"GGUF\x03\x00\x00\x00\x00\x00\x00\x00": "a GGUF file",
    b"abc": "ends after 3 bytes",
    b"no tensors at all, but text": "tell of a header",
}


@pytest.mark.parametrize("content", OTHER_FILES)
def test_another_file_is_called_what_it_is(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=OTHER_FILES[content]):
        locate(path)
    index = tmp_path / "x.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(WeightsError, match="is no safetensors index"):
        locate(index)


@pytest.mark.parametrize("left", [0, 4, 8, 60, 130, 143])
def test_a_truncated_file_is_refused(left: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(2)}, path)
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(WeightsError, match=r"ends after|is empty"):
        locate(path)


def test_numbers_at_odd_offsets_are_read(tmp_path: Path) -> None:
    """The format asks for no alignment."""
    header = {
        "b": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
    }
    raw = b"\1\2\3" + torch.tensor([0.5, 7.0]).numpy().tobytes()
    path = written(tmp_path / "x.safetensors", header, raw)
    at = locate(path)["w"]
    assert tensor_at(at, bytes_of(path)).tolist() == [0.5, 7.0]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 1 << 70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "U8", "F4", "C64", "f32", ""]) | json_values,
        "shape": st.lists(st.integers(-1, 5), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-1, 30), min_size=1, max_size=3) | json_values,
    },
)
headers = st.dictionaries(st.text(max_size=3), entries | json_values, max_size=4) | json_values


@MANY
@given(header=headers, numbers=st.binary(max_size=32))
def test_generated_headers(tmp_path: Path, header: object, numbers: bytes) -> None:
    """What is taken, the format's own library takes as well, and reads the same from it."""
    path = written(tmp_path / "x.safetensors", header, numbers)
    agrees_with_the_library(path)


@MANY
@given(data=st.data())
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(3, dtype=torch.half)}, path)
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        if not raw:
            break  # cut after its first byte, and that removed
        place = data.draw(st.integers(0, min(len(raw) - 1, 150)))
        how = data.draw(st.sampled_from(["change", "remove", "insert", "cut"]))
        if how == "change":
            raw[place] = data.draw(st.integers(0, 255))
        elif how == "remove":
            del raw[place]
        elif how == "insert":
            raw.insert(place, data.draw(st.integers(0, 255)))
        else:
            del raw[place + 1 :]
    path.write_bytes(raw)
    agrees_with_the_library(path)


def agrees_with_the_library(path: Path) -> None:
    try:
        found = read_header(path)
    except WeightsError:
        return
    whole = bytes_of(path)
    if "__metadata__" in path.read_bytes().decode(errors="replace"):
        return  # the library looks at these notes, which say nothing about numbers
    with safe_open(path, framework="pt") as tensors:
        assert set(tensors.keys()) == set(found)
    known = {n: at for n, at in found.items() if at.dtype is not None}
    if len(known) == len(found):
        for name, tensor in load_file(path).items():
            ours = tensor_at(known[name], whole)
            assert ours.dtype == tensor.dtype
            assert torch.equal(ours.view(torch.uint8), tensor.view(torch.uint8))


names = st.text(alphabet="ab.", max_size=3)
PLACES = (
    "one.safetensors", "two.safetensors", "", ".", "../one.safetensors", "/etc/passwd", "a\\b",
    "sub/../../x.safetensors", "C:\\x", "absent.safetensors", "\0", "sub", "x" * 300,
)  # fmt: skip
files = st.sampled_from(PLACES)


@MANY
@given(pairs=st.lists(st.tuples(names, files | json_values), max_size=4), rest=json_values)
def test_generated_indices(tmp_path: Path, pairs: list[tuple[str, Any]], rest: object) -> None:
    """What is taken names every tensor once, in a file of the folder that holds it."""
    stored = {"one.safetensors": ["a", "b"], "two.safetensors": ["a.b", "b.a"]}
    for file, own in stored.items():
        if not (tmp_path / file).exists():
            save_file({name: torch.ones(2) for name in own}, tmp_path / file)
    (tmp_path / "sub").mkdir(exist_ok=True)
    index = tmp_path / "m.safetensors.index.json"
    told = ",".join(f"{json.dumps(name)}:{json.dumps(file)}" for name, file in pairs)
    index.write_text(f'{{"weight_map": {{{told}}}, "metadata": {json.dumps(rest)}}}')
    is_right = len(pairs) == len({n for n, _ in pairs}) > 0 and all(
        isinstance(file, str) and name in stored.get(file, ()) for name, file in pairs
    )
    try:
        found = locate(index)
    except WeightsError:
        assert not is_right or "NaN" in index.read_text() or "metadata" in index.read_text()
        return
    assert is_right
    assert {n: at.file.name for n, at in found.items()} == dict(pairs)


@MANY
@given(content=st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode()))
def test_what_is_no_index_at_all(tmp_path: Path, content: bytes) -> None:
    index = tmp_path / "m.safetensors.index.json"
    index.write_bytes(content)
    with pytest.raises(WeightsError):
        locate(index)
