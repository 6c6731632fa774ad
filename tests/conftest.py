"""Models, traced programs and helpers that tests share; what is slow is made once a worker."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from cp_convert import ContextParallelInput, ContextParallelOutput, cli
from cp_convert.cache import fingerprint
from cp_convert.capture.decompose import decompose
from cp_convert.capture.trace import trace
from cp_convert.ir.network import Network
from cp_convert.ir.program import Lowered
from cp_convert.ir.sharded import Sharded
from cp_convert.mesh import Axis, Mesh
from cp_convert.prove import Stages
from cp_convert.runtime import launch
from cp_convert.sharding.shard import shard
from cp_convert.strategies import CONTROL, Strategy, choose
from cp_convert.strategies.rewrite import rewrite
from cp_convert.strategies.rounded import rounded
from tests import server

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # so do processes: others' tests run beside them
server.share()


FIRST = (
    "tests/test_wheel.py", "tests/test_survival.py", "tests/test_ci_example.py",
    "tests/diffusers/test_example.py", "tests/test_examples.py", "tests/test_models.py",
)  # fmt: skip
"""Tests of many seconds each: one that is begun last is waited for by all other workers."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; the others in the order in which they are written."""
    items.sort(key=lambda item: not item.nodeid.startswith(FIRST))


def pytest_collection_finish() -> None:
    """What is imported by now stays; the collector would look at it again and again."""
    gc.collect()
    gc.freeze()


def axis_of(world: int) -> Axis:
    """The one axis of a plain world."""
    return Mesh.line(world).whole


def strategy(name: str, world: int) -> Strategy:
    """The strategy of this name; USP is all exchange at 2, all ring at 3, pairs in a ring at 4."""
    return choose(name, {1: 1, 2: 2, 3: 1, 4: 2, 6: 3, 8: 4}[world])


@cache
def example(name: str) -> ModuleType:
    """An example file as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(EXAMPLES))
    spec.loader.exec_module(module)
    sys.path.remove(str(EXAMPLES))
    return module


SHORTER = {
    "flux": (("GRID = 32", "GRID = 8"), ("TEXT_TOKENS = 128", "TEXT_TOKENS = 16")),
    "plain_dit": (("BLOCKS = 512, 16, 256, 8, 3", "BLOCKS = 100, 16, 64, 8, 1"),),
}


def shorter(name: str, folder: Path) -> Path:
    """A copy of an example with fewer tokens, and of equal blocks one: all it does, less often."""
    path = folder / f"{name}.py"
    text = (EXAMPLES / path.name).read_text()
    for old, new in SHORTER[name]:
        assert old in text, old
        text = text.replace(old, new)
    path.write_text(text)
    return path


class TinyAttention(nn.Module):
    """Self-attention over 24 tokens, then cross-attention to 5 whole ones; no more than that."""

    def __init__(self, heads: int = 12, width: int = 96, channels: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(channels, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.to_q = nn.Linear(width, width)
        self.to_kv = nn.Linear(channels, 2 * width)
        self.leave = nn.Linear(width, channels)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        """``[B, S, 8]`` and ``[B, T, 8]`` to ``[B, S, 8]``."""
        x = self.enter(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        q = self.to_q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.to_kv(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave(x)


TINY_PLAN: Mapping[str, Any] = {
    "": {"x": ContextParallelInput(split_dim=1, expected_dims=3)},
    "leave": ContextParallelOutput(gather_dim=1, expected_dims=3),
}


def sharpened(module: nn.Module, factor: float = 3.0) -> nn.Module:
    """Larger weights, so that attention is far from uniform and matters."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor if parameter.dim() > 1 else 1.0)
    return module.eval()


def tiny(**options: int) -> nn.Module:
    """A :class:`TinyAttention` with fixed random weights."""
    torch.manual_seed(0)
    return sharpened(TinyAttention(**options))


def tiny_inputs(batch: int = 2) -> dict[str, Tensor]:
    """Inputs of :func:`tiny`; 24 tokens divide among 2, 3, 4, 6 and 8 ranks."""
    torch.manual_seed(1)
    return {"x": torch.randn(batch, 24, 8), "text": torch.randn(batch, 5, 8)}


MODEL_FILE = """
import torch
from torch import nn
from torch.nn import functional
from cp_convert import ContextParallelInput, ContextParallelOutput, cli

cp_plan = {
    "enter": {"input": ContextParallelInput(split_dim=1)},
    "leave": ContextParallelOutput(gather_dim=1),
}

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.enter, self.qkv, self.leave = nn.Linear(8, 64), nn.Linear(64, 192), nn.Linear(64, 8)

    def forward(self, x):
        q, k, v = self.qkv(self.enter(x)).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(8 * q, k, v)
        return self.leave(mixed.transpose(1, 2).flatten(2))

def build_model():
    torch.manual_seed(0)
    return Model()

def example_inputs():
    torch.manual_seed(1)
    return {"x": torch.randn(1, 16, 8)}
"""


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Conversions by the command line keep what they make in a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Installed(NamedTuple):
    """What a key takes from an installed package."""

    name: str
    version: str
    requires: tuple[str, ...]


def _installed(one: metadata.Distribution) -> Installed:
    return Installed(one.name, one.version, tuple(one.requires or ()))


@pytest.fixture(autouse=True, scope="session")
def installed_packages() -> Iterator[None]:
    """They stay as they are while tests run; every conversion would read and parse all of them."""
    told = SimpleNamespace(
        distribution=cache(lambda name: _installed(metadata.distribution(name))),
        distributions=cache(lambda: [_installed(one) for one in metadata.distributions()]),
        PackageNotFoundError=metadata.PackageNotFoundError,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprint, "metadata", told)
        patch.setattr(fingerprint, "_required", cache(fingerprint._required))
        yield


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that ``cp-convert run`` starts are forked: each would import torch for itself."""
    popen = SimpleNamespace(**{**vars(subprocess), "Popen": server.Forked})
    monkeypatch.setattr(launch, "subprocess", popen)


@pytest.fixture
def model_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small model file, with replacements, and returns its path."""

    def write(*replacements: tuple[str, str], name: str = "model.py") -> Path:
        text = MODEL_FILE
        for old, new in replacements:
            assert old in text, old
            text = text.replace(old, new)
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


@cache
def table() -> dict[Any, Any]:
    """The backend's decompositions."""
    from cp_convert.trt.libraries import decompositions

    return decompositions()


def sharded(
    module: nn.Module, inputs: Mapping[str, Any], plan: Mapping[str, Any], world: int
) -> Sharded:
    """A program for all ranks whose attentions still wait for a strategy."""
    program, _ = trace(module, inputs, plan)
    return shard(decompose(program, table()), axis_of(world))


def rewritten(
    module: nn.Module,
    inputs: Mapping[str, Any],
    name: str,
    world: int,
    plan: Mapping[str, Any] = TINY_PLAN,
    eight: str = "",
) -> Stages:
    """All stages up to the rewrite; ``lowered`` is the rewritten program itself.

    Args:
        module, inputs: the model.
        name: of the strategy.
        world: how many ranks.
        plan: where to split.
        eight: which of q, k, v and o travel in 8 bits.
    """
    program, _ = trace(module, inputs, plan if world > 1 else {})
    dense = decompose(program, table())
    axis = axis_of(world)
    split = shard(dense, axis)
    control, _ = rewrite(split, CONTROL, "control", axis, table())
    by = strategy(name, world)
    done, outcomes = rewrite(split, by, name, axis, table(), eight=eight)
    sites = [(o.site, o.node) for o in outcomes]
    sent = "".join(c for c in by.travels(sites[0][0], axis) if c in eight)
    quantized = rounded(dense, split, sent, axis, table()) if sent else None
    return Stages(dense, control, done, done, sites, axis, quantized)


def networks_of(lowered: Lowered, world: int) -> list[Network]:
    """What the builder would be given, rank by rank."""
    from cp_convert.engine.build import network_of
    from cp_convert.engine.readback import constants_of, read_network
    from cp_convert.engine.specialise import specialise

    found: list[Network] = []
    for rank in range(world):
        interpreter = network_of(specialise(lowered, rank))  # it owns the network's numbers
        known = [*lowered.state.values(), *constants_of(found)]
        found.append(read_network(interpreter.ctx.net, known))
    return found


@pytest.fixture
def run(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The command line in this process, in an empty folder: exit code, and both streams."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(one) for one in arguments])
        said = capfd.readouterr()
        return int(stop.value.code or 0), said.out, said.err

    return command
