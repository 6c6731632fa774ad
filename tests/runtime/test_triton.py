import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2 as triton_pb2

from cp_convert import bundle
from cp_convert.bundle import manifest as m
from cp_convert.bundle.variants import joined
from cp_convert.cli import cli
from cp_convert.errors import ConvertError, DamagedBundle, OutputError, UsageError
from cp_convert.runtime import triton
from cp_convert.runtime.again import command_with
from tests.bundle.test_folder import manifest

COMMAND = "cp-convert 'my model.py' -s ulysses -w2 -o flux --force --weights-mode=external"


def io(name: str, dtype: str, shape: list[int], mode: Any = "input") -> m.Io:
    return m.Io(name=name, mode=mode, dtype=dtype, shape=shape)


IO = [
    io("hidden_states", "bfloat16", [1, 4096, 64]),
    io("ids", "int64", [7]),
    io("mask", "bool", [1, 7]),
    io("out", "float32", [1, 4096, 64], "output"),
]
WEIGHT = m.Weight(
    name="w", dtype="float16", shape=[2], file="weights.safetensors", offset=8, bytes=4,
    sha256="0" * 64,
)  # fmt: skip


def written(out: Path, world: int = 2, *, backend: str = "tensorrt", **changes: Any) -> Path:
    """A bundle of engines that nothing opens."""
    with bundle.staged(out) as folder:
        for rank in range(world):
            shared = changes.get("layout") == "shared"
            (folder / bundle.engine_name(rank)).write_bytes(b"plan" if shared else b"plan%d" % rank)
        told = manifest(folder, world)
        made_by = msgspec.structs.replace(told.backend, name=backend)
        changes = {"io": IO, "command": COMMAND, "backend": made_by, **changes}
        bundle.publish(folder, out, msgspec.structs.replace(told, **changes), force=True)
    return out


def parsed(model: Path) -> triton_pb2.ModelConfig:
    """The configuration as the server reads it: protobuf's parser refuses unknown fields."""
    return text_format.Parse((model / "config.pbtxt").read_text(), triton_pb2.ModelConfig())


def parameters(config: triton_pb2.ModelConfig) -> dict[str, str]:
    return {key: value.string_value for key, value in config.parameters.items()}


def test_the_configuration_is_what_the_server_parses(tmp_path: Path) -> None:
    model = triton.export(written(tmp_path / "b", 3), tmp_path / "models" / "deep", "flux")
    config = parsed(model)
    assert (config.name, config.backend, config.max_batch_size) == ("flux", "tensorrt", 0)
    kinds = triton_pb2.ModelInstanceGroup
    assert [(g.kind, g.count) for g in config.instance_group] == [(kinds.KIND_MODEL, 1)]
    assert [(i.name, i.data_type, list(i.dims)) for i in config.input] == [
        ("hidden_states", triton_pb2.TYPE_BF16, [1, 4096, 64]),
        ("ids", triton_pb2.TYPE_INT64, [7]),
        ("mask", triton_pb2.TYPE_BOOL, [1, 7]),
    ]
    assert [(o.name, o.data_type, list(o.dims)) for o in config.output] == [
        ("out", triton_pb2.TYPE_FP32, [1, 4096, 64])
    ]
    assert parameters(config) == {
        "enable_multi_device": "true",
        "multi_device_gpus": "0,1,2",
        "multi_device_per_rank_engines": "true",
    }


def test_every_rank_has_its_plan_and_they_are_links(tmp_path: Path) -> None:
    source = written(tmp_path / "b")
    model = triton.export(source, tmp_path / "models")
    files = {p.name: p for p in (model / "1").iterdir()}
    assert sorted(files) == ["model.plan", "model.plan.rank0", "model.plan.rank1"]
    assert files["model.plan"].read_bytes() == b"plan0"
    for rank in range(2):
        own = source / bundle.engine_name(rank)
        assert files[f"model.plan.rank{rank}"].samefile(own)
    assert sorted(p.name for p in model.iterdir()) == ["1", "README.md", "config.pbtxt"]
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["x"]  # the model's own name


def test_a_shared_engine_is_one_plan(tmp_path: Path) -> None:
    model = triton.export(written(tmp_path / "b", layout="shared"), tmp_path / "models")
    assert [p.name for p in (model / "1").iterdir()] == ["model.plan"]
    assert "multi_device_per_rank_engines" not in parameters(parsed(model))


def test_one_rank_is_an_ordinary_model(tmp_path: Path) -> None:
    model = triton.export(written(tmp_path / "b", 1), tmp_path / "models")
    config = parsed(model)
    assert [g.kind for g in config.instance_group] == [triton_pb2.ModelInstanceGroup.KIND_GPU]
    assert parameters(config) == {}
    assert [p.name for p in (model / "1").iterdir()] == ["model.plan"]


def test_the_readme_starts_the_server_and_warns_of_sub_groups(tmp_path: Path) -> None:
    plain = triton.export(written(tmp_path / "b"), tmp_path / "models")
    assert "tritonserver --model-repository /models" in (plain / "README.md").read_text()
    assert "11.4" not in (plain / "README.md").read_text()
    usp = written(tmp_path / "usp", 4, axes={"ring": 2, "ulysses": 2})
    assert "11.4" in (triton.export(usp, tmp_path / "models", "usp") / "README.md").read_text()


def test_external_weights_are_refused_with_the_command_that_embeds_them(tmp_path: Path) -> None:
    source = written(tmp_path / "b", weights_mode="external", weights=[WEIGHT])
    done = CliRunner().invoke(
        cli, ["export", "triton", str(source), "--repository", str(tmp_path / "models")]
    )
    assert isinstance(done.exception, UsageError)
    assert done.exception.exit_code == 2
    assert "takes inputs from the request alone" in done.exception.message
    assert done.exception.hint == (
        "convert for it: cp-convert 'my model.py' -s ulysses -w2 "
        "--weights-mode embedded --out b-triton"
    )
    assert not (tmp_path / "models").exists()


def test_engines_of_another_tensorrt_are_refused_in_the_same_message(tmp_path: Path) -> None:
    source = written(
        tmp_path / "b", backend="tensorrt-rtx", weights_mode="external", weights=[WEIGHT]
    )
    with pytest.raises(UsageError, match=r"request alone.*; and its engines are of tensorrt-rtx 1"):
        triton.export(source, tmp_path / "models")


@pytest.mark.parametrize(
    ("binding", "problem"),
    [
        (io("x", "float64", [1]), "input x is of type float64"),
        (io("x", "float32", []), "input x has no dimension"),
        (io("y", "float32", [2, 0], "output"), r"output y has the shape \[2, 0\]"),
    ],
)
def test_bindings_that_triton_lacks_are_refused(
    tmp_path: Path, binding: m.Io, problem: str
) -> None:
    with pytest.raises(UsageError, match=problem):
        triton.export(written(tmp_path / "b", io=[binding]), tmp_path / "models")


@pytest.mark.parametrize("name", ["", "a/b", "..", ".hidden", "a b"])
def test_names_that_are_no_folder_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="part of a URL"):
        triton.checked_name(name)


def refused(source: Path, repository: Path) -> ConvertError:
    with pytest.raises(ConvertError) as caught:
        triton.export(source, repository)
    return caught.value


def test_bad_targets_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    source = written(tmp_path / "b")
    (tmp_path / "models" / "x").mkdir(parents=True)
    there = refused(source, tmp_path / "models")
    assert isinstance(there, OutputError)
    assert "x exists; it is not replaced" in there.message
    assert list((tmp_path / "models" / "x").iterdir()) == []
    (tmp_path / "file").touch()
    assert "file is not a folder" in refused(source, tmp_path / "file").message


def test_what_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = written(tmp_path / "b")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # tests may run as root
    assert "is not writable" in refused(source, tmp_path / "models").message


def test_a_damaged_bundle_and_a_failure_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = written(tmp_path / "b")

    def full(file: Path, target: Path) -> None:
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patched:
        patched.setattr(triton, "place", full)
        assert "No space left" in refused(source, tmp_path / "models").message
    (source / "rank1.engine").write_bytes(b"short")
    (source / "rank1.engine").unlink()
    assert isinstance(refused(source, tmp_path / "models"), DamagedBundle)
    assert list((tmp_path / "models").iterdir()) == []


def test_the_command_line_says_what_it_wrote(tmp_path: Path) -> None:
    words = ["export", "triton", str(written(tmp_path / "b")), "--json"]
    done = CliRunner().invoke(
        cli, [*words, "--repository", str(tmp_path / "models"), "--name", "flux"]
    )
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["folder"] == str(tmp_path / "models" / "flux")
    assert "1/model.plan.rank1" in told["files"]


@pytest.mark.parametrize(
    ("command", "options", "expected"),
    [
        ("c m.py -w 2", {"--out": "o"}, "c m.py -w 2 --out o"),
        ("c m.py --out a -w 2 --force", {"--out": "o"}, "c m.py -w 2 --out o"),
        ("c m.py -oa --out=b -o c", {"--out": "o"}, "c m.py --out o"),
        (
            "c m.py --copy-weights --weights-mode external --weights w",
            {"--weights-mode": "embedded"},
            "c m.py --weights w --weights-mode embedded",
        ),
        (
            "c m.py --compute-capability 8.9 --backend tensorrt-rtx",
            {"--backend": "tensorrt"},
            "c m.py --backend tensorrt",
        ),
    ],
)
def test_a_command_is_told_again_with_other_options(
    command: str, options: dict[str, str], expected: str
) -> None:
    assert command_with(command, options) == expected


def test_one_of_several_variants(tmp_path: Path) -> None:
    source = written(tmp_path / "b", layout="shared")
    first, _ = bundle.read(source)
    names = ("small", "large")
    requests = [msgspec.structs.replace(first.request, variant=name) for name in names]
    alone = [msgspec.structs.replace(first, request=request) for request in requests]
    (source / "manifest.json").write_bytes(m.encode(joined(alone)))
    with pytest.raises(UsageError, match="the bundle has 2 variants: small, large"):
        triton.export(source, tmp_path / "models")
    assert (triton.export(source, tmp_path / "models", "x", "large") / "1/model.plan").is_file()
