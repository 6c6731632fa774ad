"""Everything that can go wrong for a user, as one tree with one exit.

::

    ConvertError
    ├── UsageError          exit 2   the request itself: an option, a path, a missing install
    │   ├── ModelFileError           model.py cannot be imported or lacks what it must define
    │   ├── WeightsError             weights that are damaged or belong to another model
    │   ├── BackendMissing           a backend that is not installed, or not usable here
    │   └── OutputError              the bundle cannot be written where it was asked for
    ├── CannotConvert       exit 3   this model, with this strategy, has no right answer here
    │   ├── CannotTrace              torch.export, or the model's own forward, refused
    │   ├── CannotShard              a plan or an attention that cannot be split as asked
    │   ├── CannotLower              an operator without a TensorRT lowering
    │   └── CannotLift               programs of several sizes that are not one
    ├── ProofFailed         exit 4   the ranks together do not compute what the model computes
    ├── BuildFailed         exit 5   TensorRT refused the network
    ├── DamagedBundle       exit 6   a bundle that is incomplete, altered or no bundle
    └── RunFailed           exit 7   ranks that died, hung, disagree or return NaN

``cli.main`` is the only place that turns one of these into an exit code.
"""

from __future__ import annotations

from typing import ClassVar


class ConvertError(Exception):
    """A mistake or limit that is explained to the user instead of shown as a traceback.

    Args:
        message: what happened and why, naming the values involved.
        where: module path, source line or file, when there is one.
        hint: what to try next.
    """

    exit_code: ClassVar[int] = 1
    title: ClassVar[str] = "Conversion failed"

    def __init__(self, message: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.hint = hint

    def as_dict(self) -> dict[str, object]:
        """The error as a JSON-ready mapping."""
        return {
            "kind": type(self).__name__,
            "message": self.message,
            "where": self.where,
            "hint": self.hint,
        }


class UsageError(ConvertError):
    """The request cannot be carried out as it was written."""

    exit_code = 2
    title = "Not a usable request"


class ModelFileError(UsageError):
    """The model file cannot be imported, or does not define what it must."""

    title = "Not a usable model file"


class WeightsError(UsageError):
    """The weights are damaged, or do not belong to this model."""

    title = "Weights do not fit"


class BackendMissing(UsageError):
    """The backend is unknown, not installed, or cannot build on this machine."""

    title = "Backend not available"


class OutputError(UsageError):
    """The bundle cannot be written where it was asked for."""

    title = "Cannot write the bundle"


class CannotConvert(ConvertError):
    """This model cannot be converted with this strategy."""

    exit_code = 3
    title = "Cannot convert this model"


class CannotTrace(CannotConvert):
    """The model's forward failed, or torch.export cannot capture it."""

    title = "Cannot trace the model"


class CannotShard(CannotConvert):
    """A plan or an attention cannot be split the way it was asked for."""

    title = "Cannot shard the model"


class CannotLower(CannotConvert):
    """An operator of the program has no TensorRT lowering."""

    title = "Cannot lower the model"


class CannotLift(CannotConvert):
    """Programs of one model at several sizes differ in more than their sizes."""

    title = "Cannot convert for a range of sizes"


class ProofFailed(ConvertError):
    """The ranks together do not compute what the dense model computes, or it cannot be told."""

    exit_code = 4
    title = "Proof failed; nothing was written"


class BuildFailed(ConvertError):
    """TensorRT refused to build an engine."""

    exit_code = 5
    title = "TensorRT could not build the engine"


class DamagedBundle(ConvertError):
    """A bundle is incomplete or altered, or the path holds no bundle."""

    exit_code = 6
    title = "Damaged bundle"


class RunFailed(ConvertError):
    """The ranks of a bundle were started and did not come to a right end together."""

    exit_code = 7
    title = "The run failed"
