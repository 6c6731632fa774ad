"""The C++ runner, run: a thread a rank, on a TensorRT and an NCCL that stand in for the real."""

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from cp_convert import bundle
from cp_convert.bundle import manifest as m
from cp_convert.bundle.folder import replace_manifest
from cp_convert.cli import cli
from cp_convert.errors import OutputError
from tests.bundle.test_folder import manifest
from tests.runtime.build_cpp import Done, Runner, built

WORLD = 4
LAYERS = [
    {"op": "rows_of_rank", "in": "x", "out": "part"},
    {"op": "matmul", "in": "part", "by": "w", "out": "product"},
    {"op": "all_to_all", "in": "product", "out": "exchanged"},
    {"op": "all_gather", "in": "exchanged", "out": "y"},
    {"op": "scale", "in": "product", "factor": 0.5, "out": "half"},
    {"op": "all_reduce", "in": "half", "out": "sum"},
    {"op": "matmul", "in": "sum", "by": "w_tied", "out": "z"},
]
COPIES = {"half_out": "half_in", "bf16_out": "bf16_in"}


def io_of(world: int) -> list[m.Io]:
    return [
        *IO[:4],
        m.Io(name="z", mode="output", dtype="float32", shape=[16 // world, 4]),
        *IO[4:],
    ]


IO = [
    m.Io(name="x", mode="input", dtype="float32", shape=[16, 4]),
    m.Io(name="half_in", mode="input", dtype="float16", shape=[3]),
    m.Io(name="bf16_in", mode="input", dtype="bfloat16", shape=[3]),
    m.Io(name="y", mode="output", dtype="float32", shape=[16, 4]),
    m.Io(name="half_out", mode="output", dtype="float16", shape=[3]),
    m.Io(name="bf16_out", mode="output", dtype="bfloat16", shape=[3]),
]


def inputs() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {
        "x": torch.randn(16, 4),
        "half_in": torch.tensor([1, -65504, 6e-8], dtype=torch.float16),
        "bf16_in": torch.tensor([1, -3e38, 1e-40], dtype=torch.bfloat16),
    }


def weight() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(4, 4)


def expected(given: dict[str, Tensor], world: int) -> dict[str, Tensor]:
    """The layers by hand, all ranks at once."""
    rows = 16 // world
    product = given["x"].view(world, rows, 4) @ weight()
    blocks = product.view(world, world, rows // world, 4)
    total = 0.5 * product.sum(0)
    return {
        "y": blocks.transpose(0, 1).reshape(16, 4),
        "z": total @ weight(),
        "half_out": given["half_in"],
        "bf16_out": given["bf16_in"],
    }


def weight_entry(name: str, file: Path | str, data: bytes, offset: int, **of: Any) -> m.Weight:
    return m.Weight(
        name=name, file=str(file), offset=offset, bytes=len(data),
        sha256=hashlib.sha256(data).hexdigest(), **of,
    )  # fmt: skip


def odd_weights(folder: Path) -> list[m.Weight]:
    """Sizes around the blocks of SHA-256, and nothing at all; engines bind and do not use them."""
    found, offset, every = [], 0, bytearray()
    for size in (0, 1, 55, 56, 63, 64, 65, 119, 120, 1000):
        data = bytes((7 * i + size) % 256 for i in range(size))
        found.append(
            weight_entry(f"odd{size}", "odd.bin", data, offset, dtype="bool", shape=[size])
        )
        every += data
        offset += size
    (folder / "odd.bin").write_bytes(every)
    return found


@dataclass
class Case:
    """A bundle, its inputs, and a run of it."""

    runner: Runner
    folder: Path
    settings: dict[str, Any]

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def weights(self) -> Path:
        return self.folder / "mine.safetensors"

    def write(
        self,
        world: int = WORLD,
        misbehave: dict[str, int] | None = None,
        layers: list[dict[str, Any]] = LAYERS,
        **changes: Any,
    ) -> None:
        """The bundle; ``changes`` are of its manifest, which the engines do not follow."""
        save_file({"other": torch.ones(3), "w": weight()}, self.weights)
        numbers = weight().numpy().tobytes()
        offset = self.weights.read_bytes().index(numbers)
        of: Any = {"dtype": "float32", "shape": [4, 4]}
        with bundle.staged(self.bundle) as folder:
            weights = [
                weight_entry("w", self.weights, numbers, offset, **of),
                weight_entry("w_tied", self.weights, numbers, offset, **of),
                *odd_weights(folder),
            ]
            engine = self._engine(world, weights, misbehave or {}, layers)
            for rank in range(world):
                (folder / bundle.engine_name(rank)).write_text(json.dumps(engine))
            told = manifest(folder, world)
            made_by = msgspec.structs.replace(told.backend, name="tensorrt", version="11.1.0.106")
            usual = {
                "io": io_of(world),
                "weights": weights,
                "weights_mode": "external",
                "backend": made_by,
            }
            told = msgspec.structs.replace(told, **{**usual, **changes})
            bundle.publish(folder, self.bundle, told, force=True)
        save_file(inputs(), self.folder / "in.safetensors")

    def _engine(
        self, world: int, weights: list[m.Weight], misbehave: dict[str, int], layers: Any
    ) -> dict[str, Any]:
        io = [
            {**msgspec.to_builtins(one)}
            | ({"copy_of": COPIES[one.name]} if one.name in COPIES else {})
            for one in io_of(world)
        ]
        io += [
            {"name": w.name, "mode": "input", "dtype": w.dtype, "shape": w.shape} for w in weights
        ]
        return {"world": world, "io": io, "layers": layers, "misbehave": misbehave}

    def add_weight(self, weight: m.Weight, seen: dict[str, Any]) -> None:
        """One more, that engines bind and see in their way."""
        (self.bundle / weight.file).write_bytes(bytes(range(weight.bytes)))
        told, _ = bundle.read(self.bundle)
        engines = []
        for one in told.engines:
            path = self.bundle / one.file
            engine = json.loads(path.read_bytes())
            engine["io"].append({"name": weight.name, "mode": "input", **seen})
            path.write_text(json.dumps(engine))
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            size = path.stat().st_size
            engines.append(msgspec.structs.replace(one, bytes=size, sha256=digest))
        weights = [*told.weights, weight]
        replace_manifest(
            self.bundle, msgspec.structs.replace(told, engines=engines, weights=weights)
        )

    def run(self, *options: object, **settings: object) -> Done:
        words = [self.bundle, "--inputs", self.folder / "in.safetensors", *options]
        return self.runner(words, self.folder / "log", {**self.settings, **settings})

    def refusal(self, code: int, *options: object, **settings: object) -> str:
        """The one message of a run that must not succeed."""
        done = self.run(*options, **settings)
        title = {2: "Not a usable request", 6: "Damaged bundle", 7: "The run failed"}[code]
        assert done.code == code, done.stderr + done.stdout
        assert done.stderr.count(title) == 1
        assert len([line for line in done.stderr.splitlines() if line[0] != " "]) == 1
        assert done.stdout == ""
        return done.stderr


@pytest.fixture(scope="session")
def runner(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Runner:
    base = tmp_path_factory.getbasetemp()
    return built((base if worker_id == "master" else base.parent) / "cp_run")


@pytest.fixture
def case(runner: Runner, tmp_path: Path) -> Case:
    return Case(runner, tmp_path, {})


def ranks(log: list[str], event: str) -> list[int]:
    """The number that ends every line of this event."""
    return [int(line.split(",")[1].split()[-1]) for line in log if line.startswith(event)]


@pytest.mark.parametrize(("world", "options"), [(4, ()), (2, ("--devices", "3,1")), (1, ())])
def test_ranks_compute_what_the_arithmetic_says(
    case: Case, world: int, options: tuple[str, ...]
) -> None:
    layers = LAYERS
    if world == 1:
        alone = {"all_to_all", "all_gather", "all_reduce"}
        scale = {"op": "scale", "factor": 1.0}
        layers = [{**one, **scale} if one["op"] in alone else one for one in LAYERS]
    case.write(world, layers=layers)
    out = case.folder / "out.safetensors"
    done = case.run("--outputs", out, "--repeat", 3, *options)
    assert done.code == 0, done.stderr
    found = load_file(out)
    wanted = expected(inputs(), world)
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-6)
    assert f"outputs: {world} ranks agree, largest relative difference 0.00e+00" in done.stdout
    assert "3 forwards, slowest rank: median" in done.stdout
    assert done.stderr == ""
    if options:
        assert ranks(done.log, "communicator of rank") == [3, 1]


def test_communicators_are_set_by_a_thread_each_and_everything_goes_in_order(case: Case) -> None:
    case.write()
    log = case.run("--repeat", 2).log
    lines = [line for line in log if line.startswith("setCommunicator")]
    assert len(lines) == len({line.split("thread")[1] for line in lines}) == WORLD
    assert sorted(ranks(log, "context gone")) == list(range(WORLD))
    assert sorted(ranks(log, "engine gone")) == list(range(WORLD))
    assert sorted(ranks(log, "communicator destroyed")) == list(range(WORLD))
    for device in range(WORLD):
        assert log.index(f"context gone, device {device}") < log.index(
            f"engine gone, device {device}"
        )
    first = next(i for i, line in enumerate(log) if line.startswith("communicator destroyed"))
    assert all("gone" not in line for line in log[first:])
    left = [int(line.split()[1]) for line in log if line.startswith("released")]
    assert min(left) == 0
    assert not [line for line in log if "aborted" in line]


def test_a_weight_goes_to_every_gpu_once_and_tied_ones_are_one(case: Case) -> None:
    case.write()
    log = case.run("--repeat", 5).log
    # w and w_tied are 64 bytes together, and so is the odd one of 64; y and x are larger.
    assert log.count("copy of 64 bytes, device 2") == 3  # those two, and the output z
    assert log.count("copy of 1000 bytes, device 2") == 1


def test_a_rank_reads_its_own_share(case: Case) -> None:
    """Ranks 0 and 2 find ``w`` in one file, 1 and 3 in another, as those that share weights do."""
    case.write()
    numbers = weight().numpy().tobytes()
    files = [case.folder / f"{place}.bin" for place in range(2)]
    for place, file in enumerate(files):
        file.write_bytes(b"0" * 8 * place + numbers)
    of: Any = {"dtype": "float32", "shape": [4, 4]}
    told, folder = bundle.read(case.bundle)
    shares = [
        weight_entry("w", file, numbers, 8 * place, ranks=[place, place + 2], **of)
        for place, file in enumerate(files)
    ]
    rest = [one for one in told.weights if one.name not in ("w", "w_tied")]
    tied = [msgspec.structs.replace(one, name="w_tied") for one in shares]
    changed = msgspec.structs.replace(told, weights=[*shares, *tied, *rest])
    replace_manifest(folder, changed)
    done = case.run("--outputs", case.folder / "out.safetensors")
    assert done.code == 0, done.stderr
    found = load_file(case.folder / "out.safetensors")
    torch.testing.assert_close(found["z"], expected(inputs(), WORLD)["z"], rtol=1e-6, atol=1e-6)
    # As where all ranks have one: w with its twin once, the odd one of 64, and the output z.
    assert done.log.count("copy of 64 bytes, device 2") == 3
    files[1].write_bytes(bytes(8) + bytes(64))
    assert f"{files[1]}: SHA-256 of w differs" in case.refusal(6)


def test_engines_that_run_one_after_another_are_not_run(case: Case) -> None:
    piece = m.Piece(after="block", folder="piece0/", io=[], weights=[])
    case.write(pieces=[piece, piece])
    assert "every rank has 2 engines, one after another, and cp_run runs one" in case.refusal(2)


def test_a_rank_that_hangs_ends_the_run_in_time(case: Case) -> None:
    case.write(misbehave={"hang": 2})
    start = time.monotonic()
    told = case.refusal(7, "--timeout", 0.5)
    assert time.monotonic() - start < 20
    assert "waited for one another for more than 0.5 s: rank 0, 1, 2, 3 in forward 0" in told
    log = (case.folder / "log").read_text().splitlines()
    assert sorted(ranks(log, "communicator aborted")) == list(range(WORLD))
    assert not ranks(log, "communicator destroyed")


def test_the_rank_that_is_elsewhere_is_named(case: Case) -> None:
    case.write(misbehave={"enqueue_hangs": 1})
    told = case.refusal(7, "--timeout", 0.5)
    assert "rank 1 in enqueueV3 of forward 0; rank 0, 2, 3 in forward 0" in told


def test_a_teardown_that_hangs_ends_too(case: Case) -> None:
    case.write()
    assert "rank 3 in ncclCommDestroy" in case.refusal(7, "--timeout", 0.5, DESTROY_HANGS=3)


@pytest.mark.parametrize(
    ("misbehave", "words"),
    [
        (
            {"refuse_communicator": 1},
            "rank 1: setCommunicator failed: The engine is not a multi-device engine.",
        ),
        ({"enqueue_fails": 3}, "rank 3: enqueueV3 failed: launch failed."),
    ],
)
def test_a_rank_that_fails_ends_all_with_its_own_words(
    case: Case, misbehave: dict[str, int], words: str
) -> None:
    case.write(misbehave=misbehave)
    start = time.monotonic()
    assert words in case.refusal(7)
    assert time.monotonic() - start < 20  # the others were not waited for: the limit is 60 s
    log = (case.folder / "log").read_text().splitlines()
    assert sorted(ranks(log, "communicator aborted")) == list(range(WORLD))


def test_a_rank_that_lies_is_found(case: Case) -> None:
    case.write(layers=[*LAYERS, {"op": "lie", "rank": 2, "in": "z", "out": "z"}])
    assert "output z of rank 2 differs from rank 0's by 0.5" in case.refusal(7)


@pytest.mark.parametrize(
    ("name", "value", "output"),
    [
        ("x", float("nan"), "output y of rank 0 holds"),
        ("half_in", float("inf"), "output half_out of rank 0 holds 1 of 3 numbers"),
        ("half_in", float("nan"), "output half_out of rank 0 holds 1 of 3 numbers"),
        ("bf16_in", float("nan"), "output bf16_out of rank 0 holds 1 of 3 numbers"),
    ],
)
def test_what_is_no_number_is_told(case: Case, name: str, value: float, output: str) -> None:
    case.write()
    given = inputs()
    given[name].view(-1)[1] = value
    save_file(given, case.folder / "in.safetensors")
    assert output in case.refusal(7)


def test_a_missing_or_changed_weight_file_is_damage(case: Case) -> None:
    case.write()
    data = bytearray(case.weights.read_bytes())
    data[-1] ^= 1
    case.weights.write_bytes(data)
    assert "mine.safetensors: SHA-256 of w differs" in case.refusal(6)
    assert case.run("--no-verify").code == 0
    case.weights.write_bytes(data[:-1])
    assert "mine.safetensors ends before w" in case.refusal(6)
    case.weights.unlink()
    assert "mine.safetensors cannot be read: No such file" in case.refusal(6)


def test_a_changed_engine_is_damage(case: Case) -> None:
    case.write()
    engine = case.bundle / "rank3.engine"
    engine.write_bytes(engine.read_bytes().replace(b"all_gather", b"all_gutter"))
    assert "rank 3: " in (told := case.refusal(6))
    assert "rank3.engine: SHA-256 differs" in told
    engine.unlink()
    assert "rank3.engine cannot be read" in case.refusal(6)


def test_no_bundle_is_told(case: Case) -> None:
    case.write()
    (case.bundle / "manifest.json").write_text("{}")
    assert "manifest.json is not a manifest" in case.refusal(6)
    (case.bundle / "manifest.json").unlink()
    assert "manifest.json cannot be read" in case.refusal(6)


@pytest.mark.parametrize(
    ("stored", "shape", "taken", "counted", "fits"),
    [
        ("float8_e4m3fn", [4, 4], "float8_e4m3fn", [4, 4], True),
        ("uint8", [4, 4], "float4_e2m1fn_x2", [4, 8], True),
        ("uint8", [4, 4], "float4_e2m1fn_x2", [4, 4], False),
        ("float8_e4m3fn", [4, 4], "float4_e2m1fn_x2", [4, 8], False),
    ],
)
def test_weights_that_are_codes(
    case: Case, stored: str, shape: list[int], taken: str, counted: list[int], fits: bool
) -> None:
    """Two codes of 4 bits lie in a byte; the engine counts codes, the manifest bytes."""
    case.write()
    codes = weight_entry("codes", "codes.bin", bytes(range(16)), 0, dtype=stored, shape=shape)
    case.add_weight(codes, {"dtype": taken, "shape": counted})
    if fits:
        done = case.run()
        assert done.code == 0, done.stderr
    else:
        assert f"another codes than the manifest's {stored} [4, 4]" in case.refusal(6)


def test_an_engine_with_other_bindings_is_damage(case: Case) -> None:
    case.write(io=[*io_of(WORLD), m.Io(name="late", mode="output", dtype="bool", shape=[1])])
    assert "the engine has no output late" in case.refusal(6)
    case.write(io=io_of(WORLD)[:-1])
    assert "bindings, the manifest" in case.refusal(6)


def changed(name: str, tensor: Tensor | None) -> dict[str, Tensor]:
    given = {**inputs(), name: tensor}
    return {key: value for key, value in given.items() if value is not None}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (changed("half_in", None), "the file lacks half_in."),
        (changed("more", torch.ones(1)), "the file has what is no input: more."),
        (changed("x", torch.ones(16, 5)), "x is float32 [16, 5], the engines take float32 [16, 4]"),
        (changed("x", torch.ones(16, 4).half()), "x is float16 [16, 4], the engines take float32"),
        (changed("x", torch.ones(2).double()), "input x is of type F64, which cp_run lacks"),
    ],
)
def test_wrong_inputs_are_told(case: Case, given: dict[str, Tensor], words: str) -> None:
    case.write()
    save_file(given, case.folder / "in.safetensors")
    assert words in case.refusal(2)


@pytest.mark.parametrize("data", [b"", b"12345678", b"\xff" * 20, b"\2" + b"\0" * 7 + b"[]x"])
def test_a_file_that_is_no_safetensors_is_told(case: Case, data: bytes) -> None:
    case.write()
    (case.folder / "in.safetensors").write_bytes(data)
    told = case.refusal(2)
    assert "is no safetensors file" in told or "lacks" in told


@pytest.mark.parametrize(
    ("options", "settings", "words"),
    [
        ((), {"GPUS": 0}, "no GPU can be used here: CUDA driver version is insufficient"),
        ((), {"GPUS": 2}, "has 4 ranks and needs GPU 3; here are 2 GPUs"),
        (("--devices", "0,1"), {}, "--devices names 2 GPUs for 4 ranks"),
        (("--devices", "0,1,2,1"), {}, "names GPU 1 twice"),
        (("--devices", "0,1,2,7"), {}, "needs GPU 7"),
        ((), {"MAJOR": 9, "MINOR": 0}, "GPU 0 has compute capability 9.0"),
        ((), {"NCCL": 21805}, "NCCL is 2.18.5; TensorRT's collectives need 2.28.3"),
        ((), {"TENSORRT": 110400}, "built by tensorrt 11.1.0.106, and libnvinfer.so.11 is 11.4.0"),
        (("--library", "/nowhere/libx.so"), {}, "tensorrt cannot be opened: /nowhere/libx.so"),
        ((), {"FREE": 1000}, "its GPU has 1000 bytes free"),
        (("--outputs", "/nowhere/out"), {}, "--outputs /nowhere/out cannot be written: No such"),
        (("--repeat", "x"), {}, "--repeat x: not a number"),
        (("--timeout", "0"), {}, "--timeout 0: must be more than 0"),
        (("--quick",), {}, "unexpected --quick"),
    ],
)
def test_requests_that_cannot_be_met_are_told(
    case: Case, options: tuple[str, ...], settings: dict[str, object], words: str
) -> None:
    case.write()
    assert words in case.refusal(2, *options, **settings)


def test_what_cuda_and_nccl_refuse_is_told_in_their_words(case: Case) -> None:
    case.write()
    assert "cudaMalloc of 1000" not in (told := case.refusal(7, LARGEST=100))
    assert "bytes: out of memory" in told
    assert "rank 0: ncclCommInitAll: internal error" in case.refusal(7, INIT_FAILS=1)


def test_engines_of_another_product_need_another_cp_run(case: Case) -> None:
    case.write()
    told, _ = bundle.read(case.bundle)
    case.write(backend=msgspec.structs.replace(told.backend, name="tensorrt-rtx"))
    assert "compiled with the headers of tensorrt." in case.refusal(2)


def test_the_project_is_written_whole_and_never_over_another(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "mine"
    done = CliRunner().invoke(cli, ["export", "cpp", str(out), "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert {"CMakeLists.txt", "README.md", "src/main.cpp", "src/world.cpp"} <= set(told["files"])
    again = CliRunner().invoke(cli, ["export", "cpp", str(out)])
    assert isinstance(again.exception, OutputError)
    assert [p.name for p in out.parent.iterdir()] == ["mine"]
    listed = set((out / "CMakeLists.txt").read_text().split())
    assert {f"src/{p.name}" for p in (out / "src").glob("*.cpp")} == {
        word.rstrip(")") for word in listed if word.startswith("src/")
    }
