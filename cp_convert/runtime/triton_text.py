"""What a person and a server read of a Triton model: its configuration and its README."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Final

from ..bundle.manifest import Io, Manifest
from ..releases import NCCL

RELEASE: Final = "26.07"
"""The first release of Triton whose announcement names the multi-device path."""


def config(manifest: Manifest, name: str, types: Mapping[str, str]) -> str:
    """``config.pbtxt``: the text form of Triton's ``ModelConfig``.

    Args:
        manifest: the bundle's; every binding's type is in ``types``.
        name: of the model.
        types: Triton's types by the manifest's.
    """
    lines = [
        f"name: {json.dumps(name)}",
        'backend: "tensorrt"',
        "max_batch_size: 0",
        *_bindings("input", manifest.io, types),
        *_bindings("output", manifest.io, types),
        *_instances(manifest),
    ]
    return "\n".join(lines) + "\n"


def _bindings(mode: str, io: list[Io], types: Mapping[str, str]) -> Iterator[str]:
    for one in io:
        if one.mode == mode:
            dims = ", ".join(str(n) for n in one.shape)
            named = f"name: {json.dumps(one.name)}  data_type: {types[one.dtype]}"
            yield f"{mode} [ {{ {named}  dims: [ {dims} ] }} ]"


def _instances(manifest: Manifest) -> Iterator[str]:
    """One instance over all ranks' GPUs, rank r on the r-th; a world of 1 is an ordinary model."""
    if manifest.world == 1:
        yield "instance_group [ { kind: KIND_GPU  count: 1 } ]"
        return
    yield "instance_group [ { kind: KIND_MODEL  count: 1 } ]"
    gpus = ",".join(str(rank) for rank in range(manifest.world))
    parameters = {"enable_multi_device": "true", "multi_device_gpus": gpus}
    if manifest.layout == "per-rank":
        parameters["multi_device_per_rank_engines"] = "true"
    for key, value in parameters.items():
        yield f'parameters [ {{ key: "{key}"  value: {{ string_value: "{value}" }} }} ]'


def readme(manifest: Manifest, name: str) -> str:
    """How the server is started, what it must be, and what it does not do."""
    return f"""\
# {name}: {manifest.model.name}, {manifest.strategy}, {manifest.world} GPUs

Start Triton with the folder that holds this one:

    docker run --rm --gpus all --ipc host --ulimit memlock=-1 -p 8000:8000 -p 8001:8001 \\
      -v REPOSITORY:/models nvcr.io/nvidia/tritonserver:{RELEASE}-py3 \\
      tritonserver --model-repository /models

- Triton's TensorRT must be the one that built the engines: {manifest.backend.version}. A plan
  belongs to its release; the release notes of each Triton say which one it has.
- The TensorRT backend must have multi-device support (`TRITON_ENABLE_TENSORRT_MULTI_DEVICE`, in the
  source since 26.06, announced with {RELEASE}), and NCCL must be {NCCL} or later.
- Rank r runs on the r-th GPU of `multi_device_gpus` in config.pbtxt: change the numbers there.
{_groups(manifest)}\
- A request holds all inputs, whole; the answer is rank 0's outputs. No CUDA graphs, one host.
- A rank that fails leaves the others waiting: the backend has no time limit. Watch it from
  outside.

Converted by: `{manifest.command}`
"""


def _groups(manifest: Manifest) -> str:
    """A warning where collectives run in a part of the ranks."""
    parts = [size for size in manifest.axes.values() if size > 1]
    if len(parts) < 2 and not manifest.groups:
        return ""
    return (
        "- Some collectives run in a part of the ranks. TensorRT 11.0 to 11.3 is reported to run "
        "them\n  over all ranks, silently; use 11.4 or later.\n"
    )
