"""Pieces by the TensorRT executor, on a TensorRT and a GPU that stand in for the real."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from cp_convert import bundle as bundles
from cp_convert.bundle import manifest as m
from cp_convert.errors import DamagedBundle
from cp_convert.runtime.step_cache import StepCache
from cp_convert.runtime.tensorrt_executor import TensorRTExecutor, bytes_needed
from tests.runtime import test_tensorrt
from tests.runtime.test_tensorrt import Log, StandInGpu, stand_in

bundle = test_tensorrt.bundle
STREAM, LEFT, RESIDUAL = "between.add", "between.add_1", "between.residual"
PIECES = (
    ("block", ("x",), (STREAM, RESIDUAL), ["w"]),
    ("blocks", (STREAM,), (LEFT,), ["w", "tied"]),
    (None, (LEFT, STREAM), ("y",), []),
)
"""After which module each ends, what it takes, what it returns, and its weights."""


def data_of(number: int) -> bytes:
    """An engine's file, longer from piece to piece."""
    return f"piece {number} ".encode() * (number + 1)


class Replaying(StandInGpu):
    """Graphs that do again what was captured, with the addresses of then, as CUDA's have them."""

    contexts: Sequence[Any] = ()

    def captured(self, work: Callable[[], None]) -> Any:
        then = [dict(one.bound) for one in self.contexts]

        def again() -> None:
            now = [one.bound for one in self.contexts]
            for one, bound in zip(self.contexts, then, strict=True):
                one.bound = bound
            work()
            for one, bound in zip(self.contexts, now, strict=True):
                one.bound = bound

        return again

    def replay(self, graph: Any) -> None:
        graph()


def in_pieces(bundle: Path) -> m.Manifest:
    """The bundle of two ranks with three engines a rank."""
    manifest = bundles.read(bundle)[0]
    pieces, engines = [], []
    for number, (after, taken, given, weights) in enumerate(PIECES):
        io = [
            m.Io(name=name, mode=mode, dtype="float32", shape=[64])  # type: ignore[arg-type]
            for names, mode in ((taken, "input"), (given, "output"))
            for name in names
        ]
        pieces.append(m.Piece(after=after, folder=f"piece{number}/", io=io, weights=weights))
        for rank in range(2):
            file = bundle / f"piece{number}" / f"rank{rank}.engine"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(data_of(number))
            engines.append(
                m.Engine(
                    rank=rank, file=f"piece{number}/{file.name}", bytes=file.stat().st_size,
                    sha256=bundles.sha256(file), activation_bytes=1000 * (number + 1),
                    recalled=False, piece=number,
                )
            )  # fmt: skip
    step = m.Step(residual=RESIDUAL, streams=[m.Stream(entered=STREAM, left=LEFT)])
    manifest = msgspec.structs.replace(manifest, pieces=pieces, engines=engines, step=step)
    (bundle / "manifest.json").write_bytes(m.encode(manifest))
    return manifest


def of_two_kinds(bundle: Path) -> m.Manifest:
    """The same with two pieces between, by one engine: ``u = 3 s`` and ``w`` as ``v = 3 u``."""
    manifest = in_pieces(bundle)
    first, between, last = manifest.pieces
    taken, given = "between.add_1", "between.add_2"
    io = [
        m.Io(name=name, mode=mode, dtype="float32", shape=[64])  # type: ignore[arg-type]
        for name, mode in ((taken, "input"), (given, "output"))
    ]
    twin = m.Piece(
        after="other", folder=between.folder, io=io, weights=["w", "tied"], kind=1,
        names={STREAM: taken, LEFT: given, "tied": "w", "w": "tied"},
    )  # fmt: skip
    end = msgspec.structs.replace(last.io[0], name=given)
    last = msgspec.structs.replace(
        last, io=[end, *last.io[1:]], kind=None, folder="piece3/", after=None
    )
    engines = [
        msgspec.structs.replace(one, piece=3) if one.piece == 2 else one for one in manifest.engines
    ]
    manifest = msgspec.structs.replace(
        manifest, pieces=[first, between, twin, last], engines=engines, step="none"
    )
    (bundle / "manifest.json").write_bytes(m.encode(manifest))
    return manifest


def computing(log: Log) -> Any:
    """The stand-in, whose contexts compute by what is bound to them.

    ``add = 3 x``, ``residual = 2 x``; ``add_1 = 3 add``; ``y = add_1 - add``.
    """
    trt = stand_in(log)
    trt.contexts = []

    def execute(self: Any, stream_handle: int) -> bool:
        log.append("execute " + " ".join(name for name in self.bound if name not in ("w", "tied")))
        read = torch.frombuffer
        tensors = {n: read(at(memory), dtype=torch.float32) for n, memory in self.bound.items()}
        if "x" in tensors:
            tensors[STREAM][:] = tensors["x"] * tensors["w"]
            tensors[RESIDUAL][:] = 2 * tensors["x"]
        elif "y" in tensors:
            tensors["y"][:] = tensors[LEFT] - tensors[STREAM]
        else:
            tensors[LEFT][:] = tensors[STREAM] * tensors["tied"]
        return True

    runtime = trt.Runtime
    deserialize = runtime.deserialize_cuda_engine

    def deserialized(self: Any, data: memoryview) -> Any:
        engine = deserialize(self, data)
        create = engine.create_execution_context

        def created(*args: Any) -> Any:
            context = create(*args)
            type(context).execute_async_v3 = execute
            trt.contexts.append(context)
            return context

        engine.create_execution_context = created
        return engine

    runtime.deserialize_cuda_engine = deserialized
    return trt


def at(memory: int) -> Any:
    import ctypes

    return (ctypes.c_float * 64).from_address(memory)


def opened(
    bundle: Path, log: Log, monkeypatch: pytest.MonkeyPatch, steps: StepCache | None, **more: Any
) -> TensorRTExecutor:
    trt, gpu = computing(log), Replaying(log)
    gpu.contexts = trt.contexts
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", trt)
    manifest, folder = bundles.read(bundle)
    return TensorRTExecutor(manifest, folder, 1, None, 4711, gpu=gpu, steps=steps, **more)


def test_pieces_share_memory_and_run_one_after_another(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: Log = []
    manifest = in_pieces(bundle)
    with opened(bundle, log, monkeypatch, None) as executor:
        assert [line for line in log if line.startswith("engine")] == [
            f"engine {data_of(number).decode()!r}" for number in range(3)
        ]
        assert log[2:8:2] == ["context user-managed"] * 3
        most = 1000 + 24 * 24  # the largest engine decides
        assert log[-6:] == [f"memory {most}"] * 3 + ["communicator 4711"] * 3
        bound = [line for line in log if line.startswith("address")]
        assert bound == [
            f"address {name}"
            for _, _, given, weights in PIECES
            for name in (*sorted(weights, key=["w", "tied"].index), *given)
        ]
        log.clear()
        x = executor.gpu.empty([64], torch.float32).fill_(2)
        assert executor(x=x)["y"][0] == 2 * 3 * 3 - 2 * 3
        ran = [line for line in log if line.startswith("execute")]
        assert [line.split()[-1] for line in ran] == ["x", STREAM, STREAM]
    assert bytes_needed(manifest, 0) == 8 + 16 + 24 + 3000 + 256  # the most activations


@pytest.mark.parametrize("graph", [False, True])
def test_one_engine_computes_several_pieces(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, graph: bool
) -> None:
    log: Log = []
    manifest = of_two_kinds(bundle)
    # The last engine of this stand-in takes its stream under the name that it was built with.
    names = {LEFT: "between.add_2", STREAM: STREAM, "y": "y"}
    pieces = [*manifest.pieces[:3], msgspec.structs.replace(manifest.pieces[3], names=names)]
    manifest = msgspec.structs.replace(manifest, pieces=pieces)
    (bundle / "manifest.json").write_bytes(m.encode(manifest))
    with opened(bundle, log, monkeypatch, None, graph=graph) as executor:
        assert sum(line.startswith("engine") for line in log) == 3, "four pieces"
        assert sum(line.startswith("context") for line in log) == 3
        assert sum(line.startswith("communicator") for line in log) == 3
        x = executor.gpu.empty([64], torch.float32)
        for value in (2.0, 5.0, 2.0):
            # 3 x, 9 x, 27 x; the last piece takes 3 x away.
            assert executor(x=x.fill_(value))["y"][0] == 24 * value
    # Both weights are one tensor; engines count once.
    assert bytes_needed(manifest, 0) == 8 + 16 + 24 + 3000 + 256


@pytest.mark.parametrize("graph", [False, True])
def test_a_step_that_is_skipped(bundle: Path, monkeypatch: pytest.MonkeyPatch, graph: bool) -> None:
    log: Log = []
    in_pieces(bundle)
    with opened(bundle, log, monkeypatch, StepCache(0.1, 1), graph=graph) as executor:
        x = executor.gpu.empty([64], torch.float32)
        found: list[tuple[float, int]] = []
        for value in (2.0, 2.1, 3.0, 2.9, 2.0):
            log.clear()
            y: Tensor = executor(x=x.fill_(value))["y"]
            found.append((round(float(y[0]), 4), sum(one[:7] == "execute" for one in log)))
        # 9 x - 3 x, x of the step that was computed last; two pieces where it is skipped.
        assert found == [(12, 3), (12, 2), (18, 3), (18, 2), (12, 3)]
        assert executor.steps is not None
        assert (executor.steps.computed, executor.steps.skipped) == (3, 2)


def test_a_piece_that_is_missing(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: Log = []
    in_pieces(bundle)
    (bundle / "piece2" / "rank1.engine").write_bytes(b"x" * 24)
    with pytest.raises(DamagedBundle, match=r"piece2/rank1\.engine: SHA-256 differs"):
        opened(bundle, log, monkeypatch, None)
    assert not [line for line in log if line.startswith("communicator")]
