"""Bundles: records of a finished conversion come in, a folder with a manifest goes out, or back in.

Reading one needs neither torch nor TensorRT: ``read`` and ``verify`` are here for that.
ADR 11 tells how weights stay outside of engines.
"""

from ..files import sha256
from .folder import (
    CONSTANTS,
    MANIFEST,
    WEIGHTS,
    Check,
    check_space,
    check_target,
    engine_name,
    publish,
    read,
    staged,
    verify,
)
from .manifest import Manifest

__all__ = [
    "CONSTANTS",
    "MANIFEST",
    "WEIGHTS",
    "Check",
    "Manifest",
    "check_space",
    "check_target",
    "engine_name",
    "publish",
    "read",
    "sha256",
    "staged",
    "verify",
]
