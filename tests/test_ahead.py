"""Variants that another process traces are those that this one would have traced."""

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from cp_convert import making
from cp_convert.ahead import Ahead, Errand, errand_of
from cp_convert.backends import BACKENDS
from cp_convert.cache.store import Cache
from cp_convert.capture import capture
from cp_convert.common import Common
from cp_convert.engine.pool import Pool
from cp_convert.ir.records import Loaded
from cp_convert.ir.serialize import pack
from cp_convert.ir.source import Cast
from cp_convert.job import Job
from cp_convert.model.load import load
from cp_convert.model.preset import path_of, read
from cp_convert.progress import Clock, Progress
from tests.model.test_preset import replace_config

pytestmark = pytest.mark.engine
SIZES = ("1024x1024", "1360x768", "1008x1008")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """FLUX of the small sizes, as a preset of its own: ``--tiny`` takes no weights."""
    path, folder = path_of("flux.1-dev"), tmp_path_factory.mktemp("ahead")
    assert path is not None
    told = read(path)
    model = replace_config(
        folder / "small.toml", {**told.config, **told.tiny, "num_layers": 1, "num_single_layers": 1}
    )
    job = Job(model, "ulysses", 2, folder / "out", resolutions=SIZES, jobs=2, proof="none")
    module = load(job).module
    numbers = {name: one.contiguous() for name, one in module.state_dict().items()}
    save_file(numbers, weights := folder / "weights.safetensors")
    job = replace(job, weights=weights, weights_mode="external", cache=folder / "cache")
    return Loaded(job, BACKENDS["tensorrt-rtx"], load(job), "tool", None, folder)


@pytest.fixture
def traced_here(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    counted: list[Any] = []
    trace: Callable[..., Any] = capture.trace
    monkeypatch.setattr(capture, "trace", lambda *a, **k: counted.append(a) or trace(*a, **k))
    return counted


def programs(loaded: Loaded, pool: Pool) -> list[tuple[str, str | None]]:
    """Digests of all variants' programs, and their keys in the cache."""
    cache, clock = Cache(loaded.job.cache), Clock(Progress())
    with closing(making._all_begun(loaded, Common(), pool, cache, clock)) as all_begun:
        found = [(one.captured.dense, one.key) for one in all_begun]
    return [(pack(dense, described=dense.state).digest(), key) for dense, key in found]


def test_the_same_programs(loaded: Loaded, traced_here: list[Any], tmp_path: Path) -> None:
    with Pool(2, 1 << 40) as pool:
        beside = programs(loaded, pool)
    assert len(traced_here) == 1
    alone = replace(loaded, job=replace(loaded.job, jobs=1, cache=tmp_path))
    with Pool(1, 1 << 40) as pool:
        here = programs(alone, pool)
    assert len(traced_here) == 1 + len(SIZES)
    assert beside == here
    assert len({key for _, key in here}) == len(SIZES)


def test_a_process_that_fails_leaves_its_work(loaded: Loaded, tmp_path: Path) -> None:
    errand = errand_of(loaded, tmp_path / "that is not there")
    assert errand is not None and errand.numbers == (1, 2)
    with Pool(2, 1 << 40) as pool:
        ahead = Ahead(errand, pool)
        for number, one in enumerate(loaded.variants):
            assert ahead.seen(number, one.source, Clock(Progress())) is None


def test_what_is_traced_where_it_is(loaded: Loaded, tmp_path: Path) -> None:
    few = replace(loaded, source=replace(loaded.source, others=loaded.source.others[:1]))
    model = tmp_path / "model.py"
    model.touch()
    own = Job(model, "ulysses", 2, tmp_path / "out", jobs=2)
    file = replace(loaded, job=own)
    one_core = replace(loaded, job=replace(loaded.job, jobs=1))
    cast = replace(loaded, source=replace(loaded.source, casts=(Cast("float32", "bfloat16", 1),)))
    for other in (few, file, one_core, cast):
        assert errand_of(other, tmp_path) is None
    assert isinstance(errand_of(loaded, tmp_path), Errand)
