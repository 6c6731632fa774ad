"""The TensorRT executor on a TensorRT and a GPU that stand in for the real: order and refusals."""

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from cp_convert import bundle as bundles
from cp_convert import releases
from cp_convert.backends import Backend
from cp_convert.bundle import manifest as m
from cp_convert.bundle.variants import joined
from cp_convert.errors import BackendMissing, DamagedBundle, RunFailed, UsageError
from cp_convert.runtime.gpu import Gpu
from cp_convert.runtime.tensorrt_executor import TensorRTExecutor, bytes_needed, why_not
from tests.bundle.test_folder import written

Log = list[str]


class StandInGpu(Gpu):
    """Memory of this machine, at addresses as CUDA gives them."""

    def __init__(self, log: Log, **answers: Any) -> None:
        super().__init__(torch.device("cpu"))
        self.log = log
        self.answers = {"capability": (8, 9), "free": 1 << 30, "nccl": (2, 28, 3)} | answers

    def use(self) -> None:
        self.log.append("use")

    def count(self) -> int:  # type: ignore[override]
        return int(self.answers.get("count", 1))

    def capability(self) -> tuple[int, int]:
        return self.answers["capability"]  # type: ignore[no-any-return]

    def free(self) -> int:
        return int(self.answers["free"])

    def nccl(self) -> tuple[int, ...]:
        return self.answers["nccl"]  # type: ignore[no-any-return]

    def stream(self) -> int:
        return 7

    def before(self) -> None:
        self.log.append("before")

    def after(self) -> None:
        self.log.append("after")

    def communicator(self, group: Any) -> int:
        raise AssertionError("one was given")

    def empty(self, shape: list[int], dtype: torch.dtype) -> Tensor:
        size = torch.Size(shape).numel() * dtype.itemsize
        whole = torch.empty(size + 256, dtype=torch.uint8)
        start = -whole.data_ptr() % 256
        return whole[start : start + size].view(dtype).view(shape)

    def synchronize(self) -> None:
        self.log.append("synchronize")

    def captured(self, work: Callable[[], None]) -> Any:
        self.log.append("capture")
        work()
        return "graph"

    def replay(self, graph: Any) -> None:
        self.log.append(f"replay {graph}")


def stand_in(log: Log, *, communicates: bool = True, takes: bool = True) -> Any:
    """A module with the names of TensorRT's that are used."""

    class Named:
        def __init__(self, name: str) -> None:
            self.name = name

        def __del__(self) -> None:
            log.append(f"end {self.name}")

    class Context(Named):
        memory = 0

        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.bound: dict[str, int] = {}

        def set_communicator(self, capsule: object) -> bool:
            get = ctypes.pythonapi.PyCapsule_GetPointer
            get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
            log.append(f"communicator {get(capsule, None)}")
            return communicates

        def set_tensor_address(self, name: str, memory: int) -> bool:
            log.append(f"address {name}")
            self.bound[name] = memory
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            log.append(f"shape {name} {shape}")
            return takes

        def execute_async_v3(self, stream_handle: int) -> bool:
            log.append(f"execute {stream_handle}")
            read = ctypes.c_float.from_address
            value = read(self.bound["x"]).value * read(self.bound["w"]).value
            read(self.bound["y"]).value = value * read(self.bound["tied"]).value
            return True

        def set_device_memory(self, memory: int, size: int) -> None:
            log.append(f"memory {size}")
            self.memory = memory

    class Engine(Named):
        device_memory_size_v2 = 1000

        def create_execution_context(self, strategy: str = "static") -> Context:
            log.append("context" if strategy == "static" else f"context {strategy}")
            return Context("context")

    class Runtime(Named):
        def __init__(self, logger: Any) -> None:
            super().__init__("runtime")
            self.logger = logger

        def deserialize_cuda_engine(self, data: memoryview) -> Engine | None:
            log.append(f"engine {bytes(data).decode()!r}")
            self.logger.log("error", "what TensorRT says")
            engine = Engine("engine")
            engine.device_memory_size_v2 += 24 * len(data)  # another of every length
            return engine if takes else None

    severity = SimpleNamespace(ERROR="error", INTERNAL_ERROR="internal")
    logger = type("ILogger", (), {"Severity": severity})
    strategies = SimpleNamespace(USER_MANAGED="user-managed")
    return SimpleNamespace(
        Runtime=Runtime, ILogger=logger, ExecutionContextAllocationStrategy=strategies
    )


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two ranks, with external weights of which two names are one tensor."""
    out = written(tmp_path / "out", b"engine ")
    save_file({"w": torch.full((64,), 3.0)}, out / "weights.safetensors")
    file = out / "weights.safetensors"
    offset = file.stat().st_size - 256
    sha = bundles.sha256(file, offset, 256)
    weights = [
        m.Weight(name=name, dtype="float32", shape=[64], file="weights.safetensors",
                 offset=offset, bytes=256, sha256=sha)
        for name in ("w", "tied")
    ]  # fmt: skip
    manifest = msgspec.structs.replace(
        bundles.read(out)[0], weights_mode="external", weights=weights, frozen=[],
        io=[m.Io(name=n, mode=mode, dtype="float32", shape=[64])  # type: ignore[arg-type]
            for n, mode in (("x", "input"), ("y", "output"))],
        backend=m.Backend(
            name="tensorrt-rtx", version="1.7.1", compute_capabilities=["8.9", "12.0+"],
            workarounds=[],
        ),
        runs_on=m.RunsOn(
            release="1.7.1", nccl="2.28.3", compute_capabilities=["8.9", "12.0+"], doubt=None
        ),
    )  # fmt: skip
    (out / "manifest.json").write_bytes(m.encode(manifest))
    monkeypatch.setattr(Backend, "version", "1.7.1")
    monkeypatch.setattr("cp_convert.runtime.tensorrt_context.ALIGNMENT", 8)  # of mapped weights
    return out


def opened(bundle: Path, log: Log, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    options = {name: more.pop(name) for name in ("communicates", "takes") if name in more}
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", stand_in(log, **options))
    manifest, folder = bundles.read(bundle)
    return TensorRTExecutor(manifest, folder, 1, None, 4711, gpu=StandInGpu(log), **more)


def test_everything_in_its_order(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: Log = []
    with opened(bundle, log, monkeypatch) as executor:
        assert log == [
            "use", r"engine 'engine \x01'", "context", "address w", "address tied", "address y",
            "communicator 4711",
        ]  # fmt: skip
        assert executor._weights["w"].data_ptr() == executor._weights["tied"].data_ptr()
        log.clear()
        x = executor.gpu.empty([64], torch.float32).fill_(2)
        assert executor(x=x)["y"][0] == 18
        assert log == ["use", "address x", "before", "execute 7", "after"]
        log.clear()
    assert log == ["synchronize", "end context", "end engine", "end runtime"]
    executor.close()
    assert log[4:] == []


def test_an_input_that_cannot_be_read_in_place_is_copied(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(bundle, [], monkeypatch) as executor:
        first = executor.gpu.empty([64], torch.float32).fill_(2)
        executor(x=first)
        strided = torch.full((64, 2), 5.0)[:, 0]
        assert executor(x=strided)["y"][0] == 45
        assert first[0] == 2  # what the caller gave before is not written to


def test_a_graph_is_captured_after_the_first_forward(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Log = []
    with opened(bundle, log, monkeypatch, graph=True) as executor:
        log.clear()
        x = executor.gpu.empty([64], torch.float32).fill_(2)
        executor(x=x)
        assert log == [
            "use", "address x", "before", "execute 7", "capture", "execute 7", "after",
        ]  # fmt: skip
        log.clear()
        executor(x=x)
        assert log[-3:] == ["before", "replay graph", "after"]


def test_a_refused_communicator_is_fatal(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: Log = []
    with pytest.raises(RunFailed, match=r"refused the communicator\. TensorRT said"):
        opened(bundle, log, monkeypatch, communicates=False)
    assert log[-4:] == ["synchronize", "end context", "end engine", "end runtime"]


def test_files_are_looked_at_before_others_are_met(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Log = []
    with pytest.raises(BackendMissing, match=r"does not take rank1.engine. TensorRT said: .what"):
        opened(bundle, log, monkeypatch, takes=False)
    (bundle / "weights.safetensors").unlink()
    with pytest.raises(DamagedBundle, match=r"weights\.safetensors cannot be read"):
        opened(bundle, log, monkeypatch)
    (bundle / "rank1.engine").write_bytes(b"engine 2")
    with pytest.raises(DamagedBundle, match=r"rank1\.engine: SHA-256"):
        opened(bundle, log, monkeypatch)
    assert not [line for line in log if line.startswith("communicator")]


def with_variants(bundle: Path) -> m.Manifest:
    """The bundle with two variants more, of other lengths of ``x``."""
    manifest = msgspec.structs.replace(
        bundles.read(bundle)[0], request=request("first"), variants=[], lora=[]
    )
    alone = [manifest]
    for number, name in enumerate(("small", "large"), 1):
        engines = []
        for engine in manifest.engines:
            file = bundle / "variants" / name / engine.file
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"engine %d" % number * number)
            engines.append(
                msgspec.structs.replace(
                    engine, file=f"variants/{name}/{engine.file}", bytes=8 * number,
                    sha256=bundles.sha256(file), activation_bytes=number << 20,
                )
            )  # fmt: skip
        io = [msgspec.structs.replace(one, shape=[64 * (number + 1)]) for one in manifest.io]
        alone.append(
            msgspec.structs.replace(manifest, request=request(name), engines=engines, io=io)
        )
    whole = joined(alone)
    (bundle / "manifest.json").write_bytes(m.encode(whole))
    return whole


def request(name: str) -> m.Request:
    return m.Request(tiny=False, resolution=None, freeze=[], variant=name, batch=None, text=None)


def test_variants_share_weights_and_memory(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: Log = []
    manifest = with_variants(bundle)
    with opened(bundle, log, monkeypatch) as executor:
        assert log[0] == "use"
        assert log[2:8:2] == ["context user-managed"] * 3
        assert [line for line in log if line.startswith("engine")] == [
            r"engine 'engine \x01'", "engine 'engine 1'", "engine 'engine 2engine 2'",
        ]  # fmt: skip
        assert log[7:-6] == ["address w", "address tied", "address y"] * 3
        most = 1000 + 24 * 16  # the largest decides
        assert log[-6:] == [f"memory {most}"] * 3 + ["communicator 4711"] * 3
        contexts = list(executor._contexts.values())
        assert len({one._context.memory for one in contexts}) == 1
        assert contexts[0]._context.memory % 256 == 0
        assert len({one._context.bound["w"] for one in contexts}) == 1
        assert len({one._context.bound["y"] for one in contexts}) == 3
        log.clear()
        for length in (64, 192, 128, 64):
            x = executor.gpu.empty([length], torch.float32).fill_(2)
            (y,) = executor(x=x).values()
            assert list(y.shape) == [length]
            assert y[0] == 18
        assert log == ["use", "address x", "before", "execute 7", "after"] * 4
        with pytest.raises(UsageError, match="nearest is small, and dimension 0 of x is 128 there"):
            executor(x=torch.zeros(130))
        del contexts  # they know the run-time, whose end is looked at
        log.clear()
    assert log == ["synchronize", *["end context", "end engine"] * 3, "end runtime"]
    needed = 8 + 8 + 16 + 256 + max(e.activation_bytes or 0 for e in manifest.engines)
    assert bytes_needed(manifest, 0) == needed + (1 << 20)  # of large's 2 MiB, not of all three


def test_graphs_of_variants_and_one_variant_alone(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Log = []
    with_variants(bundle)
    with opened(bundle, log, monkeypatch, graph=True) as executor:
        log.clear()
        for length in (64, 128, 64, 128):
            executor(x=executor.gpu.empty([length], torch.float32).fill_(2))
        done = [line for line in log if line in ("capture", "replay graph")]
        assert done == ["capture", "capture", "replay graph", "replay graph"]
        executor.use_lora(None)
        log.clear()
    log.clear()
    with opened(bundle, log, monkeypatch, variant="small") as executor:
        assert log[1:3] == ["engine 'engine 1'", "context"]
        with pytest.raises(UsageError, match=r"has the shape \[64\]; the engines were built for"):
            executor(x=torch.zeros(64))
    with pytest.raises(UsageError, match="no variant 'other'"):
        opened(bundle, log, monkeypatch, variant="other")


def test_an_engine_of_a_variant_that_is_missing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Log = []
    with_variants(bundle)
    (bundle / "variants/large/rank1.engine").unlink()
    with pytest.raises(DamagedBundle, match=r"variants/large/rank1\.engine: missing"):
        opened(bundle, log, monkeypatch)
    assert not [line for line in log if line.startswith("communicator")]
    assert log[-1] == "end runtime"


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"count": 0}, "there is no GPU"),
        ({"capability": (9, 0)}, "no kernels for compute capability 9.0; Hopper"),
        ({"capability": (8, 6)}, r"are for compute capability 8.9, 12.0\+, and this GPU has 8.6"),
        ({"nccl": (2, 27, 7)}, "NCCL 2.27.7 is loaded, and TensorRT needs 2.28.3"),
        ({"free": 1000}, "0.0 GB are free"),
    ],
)
def test_why_a_gpu_cannot(answers: dict[str, Any], words: str, bundle: Path) -> None:
    manifest = bundles.read(bundle)[0]
    reason = why_not(manifest, 0, "cuda:0", StandInGpu([], **answers))
    assert reason is not None
    assert re.search(words, reason), reason
    assert why_not(manifest, 0, "cuda:0", StandInGpu([], capability=(12, 1))) is None
    assert bytes_needed(manifest, 0) == 8 + 2**20 + 256  # the tied weight once


@pytest.mark.parametrize(
    ("installed", "built", "words"),
    [
        ("1.8.0", "1.7.1", "1.7.1, which built them, and 1.8.0 is installed"),
        ("1.6.1", "1.6.1", "is not known to run them: 1.7.1 is the first"),
    ],
)
def test_why_a_release_cannot(
    installed: str, built: str, words: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backend, "version", installed)
    manifest = bundles.read(bundle)[0]
    backend = msgspec.structs.replace(manifest.backend, version=built)
    doubt = releases.doubt("tensorrt-rtx", built, devices=True, groups=False)
    runs_on = msgspec.structs.replace(manifest.runs_on, doubt=doubt)
    manifest = msgspec.structs.replace(manifest, backend=backend, runs_on=runs_on)
    reason = why_not(manifest, 0, "cuda:0", StandInGpu([]))
    assert reason is not None
    assert words in reason


@pytest.mark.parametrize(
    ("kind", "name", "arguments"),
    [
        ("Runtime", "deserialize_cuda_engine", "serialized_engine: "),
        ("ICudaEngine", "create_execution_context", "strategy: "),
        ("IExecutionContext", "set_device_memory", "memory: "),
        ("IExecutionContext", "set_communicator", "communicator: "),
        ("IExecutionContext", "set_tensor_address", "name: str, memory: "),
        ("IExecutionContext", "set_input_shape", "name: str, shape: "),
        ("IExecutionContext", "execute_async_v3", "stream_handle: "),
        ("ILogger", "log", "severity: "),
    ],
)
def test_the_real_module_has_what_is_used(kind: str, name: str, arguments: str) -> None:
    real = pytest.importorskip("tensorrt_rtx")
    assert arguments in getattr(getattr(real, kind), name).__doc__
    assert real.ExecutionContextAllocationStrategy.USER_MANAGED
    assert isinstance(real.ICudaEngine.device_memory_size_v2, property)
    assert real.ILogger.Severity.ERROR
    assert real.ILogger.Severity.INTERNAL_ERROR
