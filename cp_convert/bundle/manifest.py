"""The manifest: what a bundle holds and how it came to be. No torch, no tensorrt.

The structs below are the schema; ``manifest.schema.json`` beside this file is generated from
them (``python -m cp_convert.bundle.manifest``) and published with the package. Decoding is strict:
unknown fields, wrong types and missing fields are errors. Sizes are bytes, times are seconds.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from .call import Count as Count
from .call import Forward as Forward
from .call import Frozen as Frozen
from .call import Io as Io
from .call import Positive as Positive
from .call import Request as Request
from .call import Returned as Returned
from .call import Sha256 as Sha256
from .call import Struct as _Struct
from .converted import Cast as Cast
from .converted import Model as Model
from .converted import Tool as Tool
from .dynamic import Dynamic as Dynamic
from .dynamic import Extent as Extent
from .dynamic import ProvenSize as ProvenSize
from .guidance import Guidance as Guidance
from .pieces import Piece as Piece
from .pieces import Step as Step
from .pieces import Stream as Stream
from .quantized import Error as Error
from .quantized import Quantization as Quantization
from .stored import BundleFile as BundleFile
from .stored import BundlePath as BundlePath
from .stored import LoraSet as LoraSet
from .stored import Weight as Weight
from .stored import of_rank as of_rank
from .tensor import SharedWeight as SharedWeight
from .tensor import Tensor as Tensor
from .tensor import WholeAttention as WholeAttention

SCHEMA_VERSION: Final = 7
SCHEMA_ID: Final = "urn:cp-convert:manifest:7"
SCHEMA_FILE: Final = Path(__file__).with_name("manifest.schema.json")

Seconds = Annotated[float, msgspec.Meta(ge=0)]


class Backend(_Struct, frozen=True):
    """The TensorRT that built the engines, and what was worked around in it."""

    name: Literal["tensorrt-rtx", "tensorrt"]
    version: str
    compute_capabilities: list[str]
    workarounds: list[str]


class RunsOn(_Struct, frozen=True):
    """What runs the engines: the backend's ``release`` and ``nccl`` or later, where they matter.

    ``compute_capabilities`` are those that the engine itself records (``8.0+``: and later);
    ``doubt`` says why the release that built the engines may not run them.
    """

    release: str | None
    nccl: str | None
    compute_capabilities: list[str]
    doubt: str | None


class PlanEntry(_Struct, frozen=True):
    """One line of the model's own plan, as it was met while tracing."""

    kind: Literal["split", "gather"]
    module: str
    tensor: str
    dim: int
    applied: bool
    reason: str | None
    global_size: Count | None


class Sharding(_Struct, frozen=True):
    """Where a tensor is split, gathered or reduced outside attention.

    ``axis`` is the mesh's; along ``cfg`` the ``tokens`` are rows of the batch.
    ``operator`` is, for a split, the input or operator whose value is split, otherwise the
    operator that needs the whole tensor or leaves partial results. ``segments`` are the lengths
    of the pieces that are split one by one (text, image); every rank holds ``local`` slots, and
    ``padding`` slots of all ranks together hold no token, which costs ``padding_percent``.
    """

    kind: Literal["split", "gather", "all_reduce"]
    axis: str
    operator: str
    module: str
    source: str | None
    dim: Count
    tokens: Positive
    local: Positive
    segments: list[Positive]
    padding: Count
    padding_percent: float


class Attention(_Struct, frozen=True):
    """One attention of the model.

    ``padded_*`` are slots of all ranks that hold nothing real: queries are computed in vain, keys
    are cut away before the softmax, heads are dropped again. ``padding_percent`` is what that
    adds to the attention's work. ``way`` says over which attentions the softmax is computed: one
    fused attention (``one``), several whose results are merged (``fused``), or scores written out
    in float32 (``explicit``). ``codes`` are those of queries, keys, values and probabilities; null
    where these are in the precision.
    """

    module: str
    source: str | None
    batch: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    local_query: Positive
    global_query: Positive
    local_key: Positive
    global_key: Positive
    mask: list[Positive] | None
    causal: bool
    rewritten: bool
    reason: str | None
    way: Literal["one", "fused", "explicit"]
    padded_heads: Count
    padded_queries: Count
    padded_keys: Count
    padding_percent: float
    codes: Literal["fp8"] | None = None


class Collective(_Struct, frozen=True):
    """All collectives of one kind in one rank's network, per forward.

    ``kind`` is what the program asks for, ``layer`` the ``CollectiveOperation`` that does it in
    the network (another one where a release needs a workaround). ``bytes_sent`` is what one rank
    puts on the wire, averaged over ranks (a broadcast is sent by its root alone, and every rank
    is root equally often).
    """

    kind: str
    layer: str
    count: Positive
    bytes_sent: Count


class Engine(_Struct, frozen=True):
    """One rank's engine file.

    ``activation_bytes`` is what TensorRT's builder says it needs; ``recalled`` says that the engine
    was not built in this conversion, but in an earlier one from the same program (the cache).
    ``piece`` is the number of the one of the manifest's ``pieces`` that it is.
    """

    rank: Count
    file: BundlePath
    bytes: Positive
    sha256: Sha256
    activation_bytes: Count | None
    recalled: bool
    piece: Count | None = None


class Program(_Struct, frozen=True):
    """The program that was handed to the lowering, to be run by torch where no TensorRT is.

    ``tensors`` holds its constants, and its parameters where the engines embed them. ``weights``
    are parameters that it reads from other files and the engines do not, because what follows from
    them was computed once.
    """

    document: BundleFile
    tensors: BundleFile
    weights: list[Weight]


class NetworkProof(_Struct, frozen=True):
    """The same comparisons with what TensorRT's builder was given, within the same bounds."""

    algebra: list[Error]
    ranks: list[Error]
    seconds: Seconds


class Proof(_Struct, frozen=True):
    """What was compared with what, and how far apart it was.

    Errors are relative to ``reference``. ``algebra`` is every rank's error with float32 arithmetic
    (and quantizers that do not round, if there are any), ``ranks`` in the bundle's precision (of a
    quantized bundle against the dense program with the same quantizers); ``dense`` is what that
    unsharded model loses in that precision, ``spread`` what it loses under other roundings that are
    as valid, and ``bound`` what the ranks may lose. ``control`` is what is lost when every rank
    attends to its own keys alone, ``controls`` by another axis of the mesh when every rank there
    keeps what is its own.
    ``against``: ``rounded`` where ``ranks`` are relative to the dense model in that precision,
    in which it loses too much. ``recalled``: computed by an earlier conversion of the same job.
    """

    status: Literal["passed", "skipped"]
    level: Literal["none", "program", "network"]
    device: Literal["cpu", "cuda"]
    reference: str | None
    against: Literal["reference", "rounded"]
    algebra: list[Error]
    ranks: list[Error]
    dense: Error | None
    spread: list[Error]
    bound: Error | None
    control: Error | None
    controls: dict[str, Error]
    network: NetworkProof | None
    seconds: Seconds
    recalled: bool


class Variant(_Struct, frozen=True):
    """A further shape of the model: what it has instead of the manifest's own fields.

    ``weights`` are those that the first variant does not list as they are, ``unused`` the names of
    those that it lists and this one does not read.
    """

    request: Request
    runs_on: RunsOn
    io: list[Io]
    frozen: list[Frozen]
    forward: Forward
    plan_source: Literal["none", "model", "inferred"]
    plan: list[PlanEntry]
    sharding: list[Sharding]
    attention: list[Attention]
    collectives: list[Collective]
    layout: Literal["per-rank", "shared"]
    engines: list[Engine]
    weights: list[Weight]
    unused: list[str]
    program: Program | None
    proof: Proof
    pieces: list[Piece] = msgspec.field(default_factory=list)
    step: Step | str | None = None


class Manifest(_Struct, frozen=True):
    """A bundle's manifest.

    ``axes`` are the mesh, row-major, the last axis counting fastest: ``cfg`` shares the branches
    of a batch, ``cp`` (or ``ring`` and ``ulysses``) a sequence, ``tp`` every weight; their groups
    follow from the sizes. ``groups`` are the process groups in which the model itself
    communicates, which divide the ``world`` beside them. ``float32`` names what computes in
    float32 all the same: patterns of module paths, and ``residual`` for the residual stream. With
    the layout ``shared`` all engine files are one (hard links where the file system has them).
    ``quantization`` is null where everything is computed and sent in the precision.
    ``lora`` are sets that were added later, see ``cp-convert lora``. ``variants`` are further
    shapes of the model; all that differs between them is here that of the first.
    ``pieces`` is empty where every rank has one engine; else each has one of every piece, and
    ``engines`` lists all ranks' of the first piece, then those of the next. ``step`` tells which
    of them a cache over steps may skip, or why it can skip none; null where there are no pieces.
    ``dynamic`` is null where every engine has one size.
    """

    schema_version: Literal[7]
    tool: Tool
    created: str
    model: Model
    request: Request
    strategy: str
    axes: dict[str, Positive]
    groups: dict[str, list[list[Count]]]
    guidance: Guidance | None
    tensor: Tensor | None
    world: Positive
    precision: Literal["fp16", "bf16", "fp32"]
    float32: list[str]
    backend: Backend
    runs_on: RunsOn
    torch: str
    torch_tensorrt: str
    io: list[Io]
    frozen: list[Frozen]
    forward: Forward
    plan_source: Literal["none", "model", "inferred"]
    plan: list[PlanEntry]
    sharding: list[Sharding]
    attention: list[Attention]
    collectives: list[Collective]
    layout: Literal["per-rank", "shared"]
    engines: list[Engine]
    weights_mode: Literal["embedded", "external"]
    weights: list[Weight]
    program: Program | None
    lora: list[LoraSet]
    quantization: Quantization | None
    proof: Proof
    variants: list[Variant]
    timings: dict[str, Seconds]
    command: str
    pieces: list[Piece] = msgspec.field(default_factory=list)
    step: Step | str | None = None
    dynamic: Dynamic | None = None


def decode(data: bytes) -> Manifest:
    """Parse and validate a manifest.

    Raises:
        msgspec.ValidationError: valid JSON that does not follow the schema.
        msgspec.DecodeError: no valid JSON.
    """
    return msgspec.json.decode(data, type=Manifest)


def encode(manifest: Manifest) -> bytes:
    """The manifest as indented JSON with a final newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def json_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of :class:`Manifest`."""
    schema = msgspec.json.schema(Manifest)
    for struct in schema["$defs"].values():
        # msgspec before 0.23 keeps the indentation of docstrings.
        struct["description"] = inspect.cleandoc(struct["description"])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": SCHEMA_ID,
        "title": "cp-convert bundle manifest",
        **schema,
    }


if __name__ == "__main__":
    SCHEMA_FILE.write_text(json.dumps(json_schema(), indent=2) + "\n")
