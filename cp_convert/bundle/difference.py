"""What two bundles differ in, from their manifests alone. No torch, no tensorrt.

What says when and how long a conversion ran (``created``, ``command``, ``timings``, what came from
the cache) is no difference between bundles, nor is the path of a file that holds the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .manifest import Attention, Engine, Manifest, Proof, Weight
from .variants import all_variants, names_of

Facts = Mapping[str, str | None]


class Difference(NamedTuple):
    """One fact that is not the same in both; ``None`` where a bundle does not have it."""

    part: str
    name: str
    before: str | None
    after: str | None


def differences(before: Manifest, after: Manifest) -> list[Difference]:
    """All that differs, part by part: model, weights, strategy, release and so on."""
    first, second = _parts(before), _parts(after)
    return [
        Difference(part, name, old.get(name), second[part].get(name))
        for part, old in first.items()
        for name in dict.fromkeys((*old, *second[part]))
        if old.get(name) != second[part].get(name)
    ]


def _parts(manifest: Manifest) -> dict[str, Facts]:
    names = [name for name in names_of(manifest) if name is not None]
    return {
        "model": _model(manifest) | {"variants": _joined(names)},
        "inputs": _each(manifest, _inputs),
        "weights": _each(manifest, _weights),
        "strategy": _each(manifest, _strategy),
        "release": _release(manifest),
        "collectives": _each(manifest, _collectives),
        "proof": _each(manifest, lambda one: _proof(one.proof)),
        "sizes": _each(manifest, _sizes),
        "files": _each(manifest, _files),
        "lora": _lora(manifest),
        "quantization": _quantization(manifest),
    }


def _each(manifest: Manifest, facts: Callable[[Manifest], Facts]) -> Facts:
    """The facts of all variants; of a further one, what is not as in the first."""
    first, *others = all_variants(manifest)
    found = dict(facts(first))
    for one in others:
        own = facts(one)
        other = {name: value for name, value in own.items() if facts(first).get(name) != value}
        found |= {f"{one.request.variant}: {name}": value for name, value in other.items()}
    return found


def _model(manifest: Manifest) -> dict[str, str | None]:
    model, request = manifest.model, manifest.request
    config = {f"config.{k}": repr(v) for k, v in sorted((model.config or {}).items())}
    return {
        "name": model.name,
        "class": model.kind,
        "parameters": str(model.parameters),
        "source": model.source_sha256,
        "tiny": str(request.tiny),
        "resolution": request.resolution,
        "batch": None if request.batch is None else str(request.batch),
        "text": None if request.text is None else str(request.text),
        "precision": manifest.precision,
        "float32": _joined(manifest.float32),
        **config,
    }


def _inputs(manifest: Manifest) -> Facts:
    shapes = {f"{io.mode} {io.name}": f"{io.dtype} {io.shape}" for io in manifest.io}
    frozen = {f"frozen {one.name}": one.value for one in manifest.frozen}
    told = manifest.dynamic
    sizes = {} if told is None else {"sizes": told.words, "shapes": repr(told.shapes)}
    return {**shapes, **sizes, **frozen, "freeze": _joined(sorted(manifest.request.freeze))}


def _weights(manifest: Manifest) -> Facts:
    """Every weight by what it is, not by where it lies."""
    casts = [f"{c.tensors} {c.stored} as {c.computed}" for c in manifest.model.casts]
    own = {_name(w): _content(w) for w in _all_weights(manifest)}
    return {"mode": manifest.weights_mode, "casts": _joined(casts), **own}


def _all_weights(manifest: Manifest) -> Iterator[Weight]:
    if manifest.program is not None:
        yield from manifest.program.weights
    yield from manifest.weights


def _name(weight: Weight) -> str:
    return f"{weight.name} of ranks {weight.ranks}" if weight.ranks else weight.name


def _content(weight: Weight) -> str:
    return f"{weight.dtype} {weight.shape} {weight.sha256}"


def _strategy(manifest: Manifest) -> Facts:
    plan = [
        f"{p.kind} {p.tensor} of {p.module or 'the model'}, {p.dim}: "
        f"{p.global_size if p.applied else p.reason}"
        for p in manifest.plan
    ]
    moves = [
        f"{s.kind} {s.operator} ({s.module}) over {s.axis}, dimension {s.dim}: {s.local} of "
        f"{s.segments}"
        for s in manifest.sharding
    ]
    return {
        "name": manifest.strategy,
        "world": str(manifest.world),
        "axes": repr(manifest.axes),
        "groups": repr(manifest.groups),
        "guidance": None if manifest.guidance is None else repr(manifest.guidance),
        "layout": manifest.layout,
        "split after": _joined([p.after for p in manifest.pieces if p.after is not None]),
        "split before": _joined([p.before for p in manifest.pieces if p.before is not None]),
        "pieces of one kind": _joined(
            [f"{n} as {p.kind}" for n, p in enumerate(manifest.pieces) if p.kind is not None]
        ),
        "plan from": manifest.plan_source,
        **_numbered("plan", plan),
        **_numbered("sharding", moves),
        **_numbered("attention", [_attention(one) for one in manifest.attention]),
    }


def _attention(one: Attention) -> str:
    done = "rewritten" if one.rewritten else f"left alone: {one.reason}"
    return (
        f"{one.module}: {one.batch} x {one.heads} ({one.kv_heads}) x {one.head_dim}, queries "
        f"{one.local_query} of {one.global_query}, keys {one.local_key} of {one.global_key}, "
        f"mask {one.mask}, causal {one.causal}, padded heads {one.padded_heads}, queries "
        f"{one.padded_queries}, keys {one.padded_keys}, {done}"
    )


def _release(manifest: Manifest) -> Facts:
    backend = manifest.backend
    return {
        "tool": manifest.tool.version,
        "torch": manifest.torch,
        "torch_tensorrt": manifest.torch_tensorrt,
        "backend": f"{backend.name} {backend.version}",
        "compute capabilities": _joined(backend.compute_capabilities),
        "workarounds": _joined(backend.workarounds),
    }


def _collectives(manifest: Manifest) -> Facts:
    return {
        f"{c.kind} by {c.layer}": f"{c.count}, {c.bytes_sent} bytes sent"
        for c in manifest.collectives
    }


def _proof(proof: Proof) -> Facts:
    """Errors to two digits: the order in which threads add changes the others."""
    network = proof.network
    return {
        "status": proof.status,
        "level": proof.level,
        "device": proof.device,
        "reference": proof.reference,
        "algebra": _worst(proof.algebra),
        "ranks": _worst(proof.ranks),
        "bound": _worst([proof.bound] if proof.bound else []),
        "control": _worst([proof.control] if proof.control else []),
        **{f"control along {axis}": _worst([error]) for axis, error in proof.controls.items()},
        "networks": _worst(network.algebra if network else []),
        "networks' ranks": _worst(network.ranks if network else []),
    }


def _sizes(manifest: Manifest) -> Facts:
    total = sum({(w.file, w.offset): w.bytes for w in manifest.weights}.values())
    engines = {_place(e): f"{e.bytes} bytes" for e in manifest.engines}
    needs = {
        f"{_place(e)} activations": f"{e.activation_bytes} bytes"
        for e in manifest.engines
        if e.activation_bytes is not None
    }
    return {"weights": f"{total} bytes", **engines, **needs}


def _place(engine: Engine) -> str:
    piece = "" if engine.piece is None else f", piece {engine.piece}"
    return f"rank {engine.rank}{piece}"


def _files(manifest: Manifest) -> Facts:
    own = {engine.file: engine.sha256 for engine in manifest.engines}
    if manifest.program is not None:
        for file in (manifest.program.document, manifest.program.tensors):
            own[file.file] = file.sha256
    return own


def _quantization(manifest: Manifest) -> Facts:
    told = manifest.quantization
    if told is None:
        return {}
    exchange = None if told.exchange is None else _joined(list(told.exchange.operands))
    return {"sent in 8 bits": exchange, "loss": _worst([told.loss] if told.loss else [])}


def _lora(manifest: Manifest) -> Facts:
    """Every set by the file that it was made from, and what that makes of the weights."""
    return {
        one.name: f"{', '.join(one.kinds)} at {one.scale:g}, from {one.source_sha256}, "
        f"{one.file.sha256}"
        for one in manifest.lora
    }


def _worst(errors: Sequence[Any]) -> str | None:
    return f"{max(error.max for error in errors):.1e}" if errors else None


def _joined(words: Sequence[str]) -> str | None:
    return ", ".join(words) or None


def _numbered(name: str, lines: Sequence[str]) -> dict[str, str]:
    return {f"{name} {i}": line for i, line in enumerate(lines)}
