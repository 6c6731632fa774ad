"""The cache: what is found again, what is not, and what is broken."""

import json
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from safetensors.torch import save_file

from cp_convert import bundle
from cp_convert.backends import select
from cp_convert.bundle.manifest import Manifest
from cp_convert.cache.store import Cache
from cp_convert.ir.serialize import pack, read_packed, unpack
from cp_convert.ir.source import Source
from cp_convert.job import Job
from cp_convert.model.load import load
from cp_convert.pipeline import convert
from cp_convert.progress import Progress
from cp_convert.recall import job_key, values_key
from tests.conftest import TINY_PLAN, rewritten, tiny, tiny_inputs

Write = Callable[..., Path]


def entry(cache: Cache, key: str, content: bytes = b"x") -> None:
    with cache.store("engines", key) as folder:
        (folder / "engine").write_bytes(content)


def test_what_was_stored_is_found_and_counted(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "c")
    assert cache.find("engines", "a") is None
    entry(cache, "a")
    found = cache.find("engines", "a")
    assert found is not None
    assert (found / "engine").read_bytes() == b"x"
    assert cache.find("engines", "b") is None
    assert {h.kind: h.entries for h in cache.held() if h.entries} == {"engines": 1}
    assert cache.clear() > 0
    assert cache.find("engines", "a") is None


def test_a_broken_entry_is_not_found_and_goes(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    entry(cache, "a")
    (tmp_path / "engines" / "a" / "engine").write_bytes(b"y")
    assert cache.find("engines", "a") is None
    assert not (tmp_path / "engines" / "a").exists()
    entry(cache, "b")
    (tmp_path / "engines" / "b" / "files.json").write_bytes(b"{")
    assert cache.find("engines", "b") is None


def test_a_full_cache_forgets_what_was_not_used_for_longest(tmp_path: Path) -> None:
    cache = Cache(tmp_path, limit=2500)
    for age, key in enumerate("abc"):
        entry(cache, key, bytes(1000))
        os.utime(tmp_path / "engines" / key, (1e9 - age, 1e9 - age))
    entry(cache, "d", bytes(1000))
    assert {path.name for path in (tmp_path / "engines").iterdir()} == {"a", "d"}


def test_what_a_killed_process_left_is_swept(tmp_path: Path) -> None:
    ended = multiprocessing.Process(target=int)
    ended.start()
    ended.join()
    left = tmp_path / "engines" / f".partial-{ended.pid}-x"
    left.mkdir(parents=True)
    entry(Cache(tmp_path), "a")
    assert not left.exists()


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    entry(Cache(tmp_path / "file"), "a")
    entry(Cache(None), "a")
    assert Cache(None).find("engines", "a") is None


def test_packed_programs_are_the_same_program(tmp_path: Path) -> None:
    done = rewritten(tiny(), tiny_inputs(), "ulysses", 2, TINY_PLAN).rewritten
    packed = pack(done)
    packed.write(tmp_path / "p")
    again = unpack(read_packed(tmp_path / "p"))
    assert pack(again).document == packed.document
    assert pack(again).digest() == packed.digest()
    nodes = zip(done.graph_module.graph.nodes, again.graph_module.graph.nodes, strict=True)
    for ours, theirs in nodes:
        assert ours.format_node() == theirs.format_node()
        value = ours.meta.get("val")
        if isinstance(value, torch.Tensor):
            assert theirs.meta["val"].shape == value.shape
            assert theirs.meta["val"].dtype == value.dtype
    assert all(torch.equal(again.state[name], tensor) for name, tensor in done.state.items())


def test_a_number_more_or_less_is_another_digest() -> None:
    done = rewritten(tiny(), tiny_inputs(), "ulysses", 2, TINY_PLAN).rewritten
    name = next(iter(done.state))
    other = replace(done, state={**done.state, name: done.state[name] + 1})
    assert pack(other).digest() != pack(done).digest()
    # Unless the weight is an input of the engine: only its type and shape matter then.
    every = list(done.state)
    assert pack(other, described=every).digest() == pack(done, described=every).digest()


@pytest.mark.engine
def test_a_conversion_is_repeated_from_the_cache(model_file: Write, tmp_path: Path) -> None:
    job = Job(
        model=model_file(), strategy="ulysses", world=2, out=tmp_path / "a", cache=tmp_path / "c"
    )
    backend = select("auto", ())
    first = convert(job, backend, Progress())
    assert "decompose" in first.timings
    assert not any(engine.recalled for engine in first.engines)

    again = convert(replace(job, out=tmp_path / "b"), backend, Progress())
    assert list(again.timings) == ["load", "trace", "recall"]
    assert all(engine.recalled for engine in again.engines)
    assert [e.sha256 for e in again.engines] == [e.sha256 for e in first.engines]
    assert not first.proof.recalled
    assert again.proof == structs.replace(first.proof, recalled=True)
    assert first.proof.level == "network"
    assert again.io == first.io
    assert not any(check.problem for check in bundle.verify(tmp_path / "b"))

    # Another bound is another proof, of the same engines.
    bound = convert(replace(job, out=tmp_path / "c1", rtol=0.5), backend, Progress())
    assert not bound.proof.recalled
    assert "decompose" not in bound.timings
    assert all(engine.recalled for engine in bound.engines)

    other = convert(replace(job, out=tmp_path / "d", strategy="ring"), backend, Progress())
    assert "decompose" not in other.timings
    assert not any(engine.recalled for engine in other.engines)

    # One engine of the two is lost, as if the first conversion had been stopped between them.
    engines = sorted((tmp_path / "c" / "engines").iterdir())
    assert len(engines) == 4
    for damaged in engines:
        (damaged / "engine").unlink()
        (damaged / "engine").write_bytes(b"half")
        break
    resumed = [
        convert(replace(job, out=tmp_path / f"e-{name}", strategy=name), backend, Progress())
        for name in ("ulysses", "ring")
    ]
    assert sum(engine.recalled for m in resumed for engine in m.engines) == 3


def test_the_key_of_a_job_holds_what_decides_its_bundle(model_file: Write, tmp_path: Path) -> None:
    job = Job(model=model_file(), strategy="ulysses", world=2, out=tmp_path, precision="fp32")
    torch.manual_seed(0)
    source = load(job)

    def key_of(job: Job, source: Source = source, program: str | None = "program") -> str | None:
        return job_key(job, values_key(job, source), [program])

    key = key_of(job)
    assert key is not None
    for same in ({"out": tmp_path / "b"}, {"jobs": 1}, {"force": True}, {"command": "other"}):
        assert key_of(replace(job, **same)) == key
    for other in ({"strategy": "ring"}, {"world": 4}, {"proof": "none"}, {"layout": "shared"}):
        assert key_of(replace(job, **other)) != key
    assert key_of(job, program="another program") != key
    assert key_of(job, program=None) is None
    name, values = next(iter(source.inputs.items()))
    given = {**source.inputs, name: values + 1}
    assert key_of(job, replace(source, inputs=given)) != key
    with torch.no_grad():
        next(source.module.parameters()).add_(1)
    assert key_of(job) != key


@pytest.mark.engine
def test_weights_in_files_count_by_the_files_state(model_file: Write, tmp_path: Path) -> None:
    """External weights are not read to find the job again; a file that was replaced is."""
    model, file = model_file(), tmp_path / "weights.safetensors"
    job = Job(
        model=model,
        strategy="ulysses",
        world=2,
        out=tmp_path / "a",
        cache=tmp_path / "c",
        precision="fp32",
        weights=file,
        weights_mode="external",
        layout="shared",
    )
    module = load(replace(job, weights=None)).module

    def converted(out: str) -> Manifest:
        return convert(replace(job, out=tmp_path / out), select("auto", ()), Progress())

    save_file(module.state_dict(), file)
    first, again = converted("a"), converted("b")
    assert list(again.timings) == ["load", "trace", "recall"]
    assert again.weights == first.weights
    assert again.proof.recalled
    assert not any(check.problem for check in bundle.verify(tmp_path / "b"))

    save_file({name: 2 * value for name, value in module.state_dict().items()}, file)
    changed = converted("d")
    assert not changed.proof.recalled
    assert [w.sha256 for w in changed.weights] != [w.sha256 for w in first.weights]
    assert all(engine.recalled for engine in changed.engines)  # they hold none of the weights


def test_cache_info_and_clear(tmp_path: Path) -> None:
    entry(Cache(tmp_path), "a")

    def told(what: str) -> Any:
        command = [sys.executable, "-m", "cp_convert", "cache", what, "--json"]
        command += ["--cache", str(tmp_path)]
        return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)

    assert told("info")["kinds"]["engines"]["entries"] == 1
    assert told("clear")["bytes"] > 0
    assert told("info")["kinds"]["engines"]["entries"] == 0


def test_an_entry_may_hold_folders(tmp_path: Path) -> None:
    """A bundle's program stands in one; an entry that could not be kept was lost in silence."""
    cache = Cache(tmp_path / "cache")
    with cache.store("bundles", "key") as folder:
        (folder / "program").mkdir()
        (folder / "program" / "graph").write_bytes(b"12345")
    entry = cache.find("bundles", "key")
    assert entry is not None
    held = {one.kind: one.entries for one in cache.held()}
    assert held["bundles"] == 1
    (entry / "program" / "graph").write_bytes(b"54321")
    assert cache.find("bundles", "key") is None
