"""A bundle for a range of sizes at work: sizes are switched within one process on every rank."""

from __future__ import annotations

import copy
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from cp_convert import bundle as bundles
from cp_convert.bundle import manifest as m
from cp_convert.bundle.sizes import AllSizes, at_size, size_of
from cp_convert.errors import UsageError
from cp_convert.job import Span
from cp_convert.lora.add import add
from cp_convert.runtime.choice import Choice
from cp_convert.runtime.torch_executor import SIZES, CalledSizes
from tests.lora.files import diffusers_names, factors, fused, linears
from tests.runtime.bundles import FLUX, QWEN, WAN, converted
from tests.runtime.test_tensorrt import Log, bundle, opened
from tests.runtime.test_variants import told

__all__ = ["bundle"]
SIZED = (
    ("def example_inputs():", "def example_inputs(tokens=16):"),
    ("torch.randn(1, 16, 8)", "torch.randn(1, tokens, 8)"),
)


def check(path: Path, span: Span, strategy: str, sizes: list[int], folder: Path) -> m.Manifest:
    """Two ranks at these sizes, one after another, against the dense model; then with a LoRA set.

    The set is added to the finished bundle and used as it is, at another strength and not at all.
    """
    out = folder / "out"
    made = converted(path, out, strategy, 2, dynamic=span, weights_mode="external")
    assert made.dynamic is not None and set(made.dynamic.sizes) == set(span.values)
    python = SimpleNamespace(**runpy.run_path(str(path)))
    inputs = [python.example_inputs(**{span.name: n}) for n in sizes]
    outside = python.example_inputs(**{span.name: span.last + 1})
    steps: list[tuple[str, Any]] = [("call", one) for one in inputs]
    steps += [("call", outside), ("call", (inputs[0], inputs[1])), ("call", inputs[0])]
    model = python.build_model()
    wanted = [_outputs(model, one) for one in (*inputs, inputs[0])]
    own = factors(linears(model, lambda name: True), 1)
    add(out, diffusers_names(own, folder / "style.safetensors"), scale=0.4)
    for asked, strength in (("style", 0.4), ({"style": -0.2}, -0.2), (None, 0.0)):
        changed = fused(copy.deepcopy(model), [(own, strength)])
        steps += [("lora", asked), *(("call", one) for one in inputs[:3])]
        wanted += [_outputs(changed, one) for one in inputs[:3]]
    names = [f"{span.name}-{n}" for n in sizes]
    for rank in told(out, steps, folder / "ranks"):
        refused, different = rank[len(sizes)], rank[len(sizes) + 1]
        assert f"the nearest size is {span.last}" in refused
        assert f"the variant {names[1]}, and rank 0 of {names[0]}" in different
        found = [*rank[: len(sizes)], *rank[len(sizes) + 2 :]]
        for one, want in zip(found, wanted, strict=True):
            assert (one.reshape(want.shape) - want).abs().max() <= 1e-5 * want.abs().max()
        for plain, changed in zip(wanted[:3], wanted[len(sizes) + 1 :][:3], strict=True):
            assert (changed - plain).abs().max() > 1e-2 * plain.abs().max()  # the set matters
        assert all(map(torch.equal, found[:3], found[-3:]))  # and leaves nothing behind
    return made


@torch.no_grad()
def _outputs(model: torch.nn.Module, given: dict[str, Any]) -> torch.Tensor:
    found = model(**given)
    found = found[0] if isinstance(found, tuple) else found
    return found.sample if hasattr(found, "sample") else found


def test_sizes_are_switched(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """Ends, sizes that nothing was lifted from, and back; then one that is too large.

    One weight is computed from another when the bundle is made, and follows a LoRA set.
    """
    path = model_file(
        *SIZED,
        ("self.qkv(self.enter(x))",
         "functional.linear(self.enter(x), self.qkv.weight.roll(64, 0), self.qkv.bias)"),
        ("return self.leave(mixed.transpose(1, 2).flatten(2))",
         "return (self.leave(mixed.transpose(1, 2).flatten(2)),)"),
    )  # fmt: skip
    made = check(path, Span("tokens", 13, 64), "ulysses", [13, 64, 30, 41, 13, 32], tmp_path)
    assert [one.name for one in made.weights if one.name.startswith("constants.")]


def test_the_stand_in_takes_every_size(model_file: Callable[..., Path], tmp_path: Path) -> None:
    """One rank, with no padding at all."""
    pytest.importorskip("diffusers")
    from cp_convert.diffusers import load_transformer

    path = model_file(
        *SIZED,
        ("return self.leave(mixed.transpose(1, 2).flatten(2))",
         "return (self.leave(mixed.transpose(1, 2).flatten(2)),)"),
    )  # fmt: skip
    converted(path, tmp_path / "out", "ulysses", 1, dynamic=Span("tokens", 4, 40))
    python = SimpleNamespace(**runpy.run_path(str(path)))
    model = python.build_model()
    with load_transformer(tmp_path / "out", executor="torch", device="cpu") as transformer:
        for n in (4, 40, 7, 12):
            given = python.example_inputs(n)
            with torch.no_grad():
                (want,) = model(**given)
            (own,) = transformer(**given)
            assert (own - want).abs().max() <= 1e-5 * want.abs().max()
        with pytest.raises(UsageError, match="the nearest size is 40"):
            transformer(**python.example_inputs(41))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "span", "strategy", "sizes"),
    [
        (FLUX, Span("text", 9, 40), "ulysses", [9, 40, 17, 24]),
        (FLUX, Span("batch", 2, 6), "ring", [2, 6, 3, 5]),
        (WAN, Span("frames", 3, 11), "ring", [3, 11, 7, 8]),
        (QWEN, Span("text", 9, 39), "allgather-kv", [9, 39, 17, 24]),
    ],
    ids=["flux-text", "flux-batch", "wan-frames", "qwen-text"],
)
def test_published_models(
    model: str, span: Span, strategy: str, sizes: list[int], tmp_path: Path
) -> None:
    path = tmp_path / "model.py"
    path.write_text(model)
    check(path, span, strategy, sizes, tmp_path)


@pytest.fixture
def ranged(bundle: Path) -> Path:
    """Engines that stand in for some of a range: the first dimension of both bindings."""
    whole = m.Extent(dim=0, scale=8, offset=0, under=1)
    dynamic = m.Dynamic(
        argument="rows", first=2, last=8, step=2, multiple=2, proven=[],
        shapes={"x": [whole], "y": [whole]},
    )  # fmt: skip
    manifest = msgspec.structs.replace(bundles.read(bundle)[0], dynamic=dynamic)
    (bundle / "manifest.json").write_bytes(m.encode(manifest))
    return bundle


def test_tensorrt_is_told_every_size(ranged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log: Log = []
    with opened(ranged, log, monkeypatch, graph=True) as executor:
        whole = executor.gpu.empty([64], torch.float32).fill_(2)
        monkeypatch.setattr(
            executor.choice,
            "picked",
            lambda given: Choice.picked(
                SimpleNamespace(manifests={"rows-4": executor.choice.manifests["rows-4"]}), given
            ),
        )  # type: ignore[arg-type]
        log.clear()
        y = executor(x=whole[:32])["y"]
        assert y.shape == (32,) and y[0] == 18
        assert log[:2] == ["use", "shape x (32,)"] and log.count("capture") == 1
        log.clear()
        executor(x=whole[:32])
        assert "replay graph" in log and not [one for one in log if one.startswith("shape")]
        executor.run("rows-8", {"x": whole})
        assert log[-6:] == ["address x", "before", "execute 7", "capture", "execute 7", "after"]
        assert executor.run("rows-8", {"x": whole})["y"].shape == (64,)


def test_a_shape_says_the_size(ranged: Path) -> None:
    manifest = bundles.read(ranged)[0]
    assert size_of(manifest, {"x": [32]}) == 4
    assert at_size(manifest, 4).io[1].shape == [32]
    for length, nearest in ((33, 4), (40, 4), (80, 8), (8, 2)):
        with pytest.raises(UsageError, match=f"the nearest size is {nearest}"):
            size_of(manifest, {"x": [length]})
    assert list(AllSizes(manifest)) == ["rows-2", "rows-4", "rows-6", "rows-8"]


def test_the_oldest_size_is_forgotten(ranged: Path) -> None:
    manifest = msgspec.structs.replace(
        bundles.read(ranged)[0],
        dynamic=msgspec.structs.replace(bundles.read(ranged)[0].dynamic, last=80),
    )
    closed: list[str] = []

    def made(name: str, *_: Any) -> Any:
        return SimpleNamespace(close=lambda: closed.append(name))

    stored = SimpleNamespace(at=lambda size: size)
    held = CalledSizes(manifest, stored, made)  # type: ignore[arg-type]
    for size in range(2, 2 * SIZES + 4, 2):
        assert held[f"rows-{size}"] is held[f"rows-{size}"]
    assert closed == ["rows-2"] and len(held) == SIZES
