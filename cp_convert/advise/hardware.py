"""What a GPU can do, from one TOML file. No torch.

Peak rates are published ones, and every file says where. The shares of them that a real program
reaches are assumptions; they stand in the same file and can be changed there.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

import msgspec

from ..errors import UsageError
from ..model.shipped import shipped
from ..words import near


class Hardware(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """One kind of GPU and what joins several of them.

    Attributes:
        title: its name in words.
        source: where the rates are published.
        half_tflops: dense matrix products in float16 or bfloat16, 1e12 operations a second.
        tf32_tflops: the same in float32 arithmetic (TF32).
        memory_gb: of one GPU, 1e9 bytes.
        memory_gb_per_s: memory bandwidth.
        link_gb_per_s: what one GPU sends to its peers, one direction.
        matmul_share: of the peak that matrix products reach; assumed.
        memory_share: of the memory bandwidth that is reached; assumed.
        link_share: of the link that a collective reaches; assumed.
        collective_us: microseconds that a collective takes besides its bytes; assumed.
    """

    title: str
    source: str
    half_tflops: float
    tf32_tflops: float
    memory_gb: float
    memory_gb_per_s: float
    link_gb_per_s: float
    matmul_share: float = 0.65
    memory_share: float = 0.8
    link_share: float = 0.7
    collective_us: float = 20.0


def names() -> list[str]:
    """Of all hardware that is described."""
    return sorted(shipped("cp_convert.configs.hardware"))


def read(name: str) -> Hardware:
    """The hardware of this name, or in the TOML file of this path.

    Raises:
        UsageError: there is none, or the file describes none.
    """
    path = shipped("cp_convert.configs.hardware").get(name, Path(name))
    if path.suffix != ".toml":
        raise UsageError(
            f"--hardware {name}: not known.",
            hint=f"{near(name, names())} A TOML file can be named, too.",
        )
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Hardware)
    except OSError as error:
        raise UsageError(f"--hardware {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, msgspec.ValidationError) as error:
        raise UsageError(f"--hardware {path} describes no hardware: {error}.") from error
