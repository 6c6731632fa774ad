"""Ranks that follow rank 0: how they end, whatever becomes of it. A model of ten lines."""

import os
import runpy
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cp_convert.diffusers import load_transformer
from cp_convert.diffusers.ranks import Ranks
from cp_convert.errors import UsageError
from tests.conftest import MODEL_FILE
from tests.diffusers.ranks import run_ranks
from tests.runtime.bundles import converted


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    (folder / "model.py").write_text(MODEL_FILE)
    converted(folder / "model.py", folder / "out", "ulysses", 2)
    return folder / "out"


def _x(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(seed))


def _led(work: Callable[[Any], Any]) -> Callable[..., Any]:
    """Rank 0 does ``work``, rank 1 follows."""

    def rank(number: int, out: Path, timeout: float = 20.0) -> Any:
        with load_transformer(out, timeout=timeout) as transformer:
            return transformer.follow() if number else work(transformer)

    return rank


def calls(number: int, out: Path) -> Any:
    return _led(lambda transformer: [transformer(x=_x(i)).tolist() for i in range(3)])(number, out)


def makes_no_call(number: int, out: Path) -> Any:
    return _led(lambda transformer: "nothing to do")(number, out)


def fails_first(number: int, out: Path) -> Any:
    return _led(_failing)(number, out)


def fails_later(number: int, out: Path) -> Any:
    return _led(lambda transformer: [transformer(x=_x()), _failing(transformer)])(number, out)


def _failing(_: Any) -> None:
    raise RuntimeError("no text encoder here")


def gives_another_size(number: int, out: Path) -> Any:
    return _led(lambda transformer: transformer(x=_x()[:, :8]))(number, out)


def forgets_to_close(number: int, out: Path) -> Any:
    transformer = load_transformer(out, timeout=20)
    return transformer.follow() if number else transformer(x=_x()).shape[1]


def is_killed(number: int, out: Path) -> Any:
    def die(transformer: Any) -> None:
        transformer(x=_x())
        os.kill(os.getpid(), signal.SIGKILL)

    return _led(die)(number, out)


def stops(number: int, out: Path) -> Any:
    """Rank 0 is there, and can say nothing; rank 1 gives up long before its end."""

    def stand_still(transformer: Any) -> None:
        transformer(x=_x())
        parent = os.getpid()
        if os.fork() == 0:
            time.sleep(12)
            os.kill(parent, signal.SIGKILL)
            os._exit(0)
        os.kill(parent, signal.SIGSTOP)

    return _led(stand_still)(number, out, 2.0)


def thinks_long(number: int, out: Path) -> Any:
    """Longer than the time-out, before calls and after."""

    def think(transformer: Any) -> int:
        for _ in range(2):
            time.sleep(2.5)
            transformer(x=_x())
        time.sleep(2.5)
        return 2

    return _led(think)(number, out, 1.5)


def both_follow(number: int, out: Path) -> Any:
    with load_transformer(out) as transformer:
        return transformer.follow() if number == 0 else transformer(x=_x())


def other_seeds(number: int, out: Path) -> Any:
    with load_transformer(out) as transformer:
        return [transformer(x=_x()).shape[1], transformer(x=_x(number)).shape[1]]


def unchecked(number: int, out: Path) -> Any:
    with load_transformer(out, check=False) as transformer:
        return transformer(x=_x(number)).shape[1]


def one_fails_alone(number: int, out: Path) -> Any:
    with load_transformer(out) as transformer:
        return _failing(transformer) if number else transformer(x=_x())


FIRST = "RunFailed: rank 0 failed before the first call: "
LATER = "RunFailed: rank 0 failed, and this rank followed it: "
GONE = "RunFailed: rank 1: another rank is gone"
FATES: list[tuple[Callable[..., Any], Any, Any]] = [
    (makes_no_call, "nothing to do", 0),
    (
        fails_first,
        "RuntimeError: no text",
        f"{FIRST}RuntimeError: no",
    ),
    (
        fails_later,
        "RuntimeError: no text",
        f"{LATER}RuntimeError: no",
    ),
    (
        gives_another_size,
        "UsageError: x has the shape [1, 8, 8]",
        f"{FIRST}UsageError: x",
    ),
    (forgets_to_close, 16, 1),
    (is_killed, "exit code -9", GONE),
    (stops, "exit code -9", "exit code 7"),
    (thinks_long, 2, 2),
    (other_seeds, *["RunFailed: rank 1 was given another x than rank 0"] * 2),
    (unchecked, 16, 16),
    (both_follow, "UsageError: rank 0 runs the pipeline", f"{FIRST}UsageError: rank 0 runs"),
    (one_fails_alone, "RunFailed: rank 1 failed before the first call", "RuntimeError: no text"),
]


SELDOM = (thinks_long, unchecked, forgets_to_close)


@pytest.mark.parametrize(
    ("work", "first", "second"),
    [
        pytest.param(*f, id=f[0].__name__, marks=[pytest.mark.slow] if f[0] in SELDOM else [])
        for f in FATES
    ],
)
def test_both_ranks_end(
    out: Path, tmp_path: Path, work: Callable[..., Any], first: Any, second: Any
) -> None:
    for found, wanted in zip(
        run_ranks(work, 2, tmp_path, out, seconds=40), (first, second), strict=True
    ):
        assert found == wanted or (isinstance(wanted, str) and str(found).startswith(wanted)), found


def test_rank_1_computes_what_rank_0_is_given(out: Path, tmp_path: Path) -> None:
    found, count = run_ranks(calls, 2, tmp_path, out)
    model = SimpleNamespace(**runpy.run_path(str(out.parent / "model.py"))).build_model()
    with torch.no_grad():
        for number, value in enumerate(found):
            want = model(_x(number))
            assert (torch.tensor(value) - want).abs().max() <= 1e-5 * want.abs().max()
    assert count == 3


@pytest.mark.parametrize("own", [1, 2])
def test_some_follow_and_some_call(own: int) -> None:
    told = [("calls", ""), ("follows", ""), ("calls", "")]
    channel: Any = SimpleNamespace(rank=own, everyone=lambda _: told)
    with pytest.raises(UsageError, match="rank 0 calls, rank 1 follows, rank 2 calls"):
        Ranks(channel, check=True).run(lambda: (None, {}), lambda _name, given: given)
