"""A bundle as the model that it was: called with the model's arguments, returning what it did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..bundle.manifest import Manifest, Returned
from ..errors import UsageError
from .executors import Executor, open_rank

if TYPE_CHECKING:  # a bundle is checked before torch is imported
    from torch import Tensor

    from ..lora.choose import Asked


class Fields(dict[str, Any]):
    """An object with named fields, whose class may not be here; ``x.a``, ``x["a"]``, ``x[0]``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, int | slice):
            return tuple(self.values())[key]
        return super().__getitem__(key)


class Opened:
    """One rank of a bundle; a context manager, whose end frees what it holds.

    Attributes:
        executor: what runs it, see :class:`.executors.Executor`.
        manifest: of the bundle.
        manifests: of the variants that are open, each alone, by name.
        rank: whose engine or program it is.
        steps: what is remembered from call to call; ``None`` where no step cache was asked for.
    """

    def __init__(self, executor: Executor) -> None:
        self.executor = executor
        self.manifest, self.rank = executor.manifest, executor.rank
        self.manifests = executor.choice.manifests
        self.steps = executor.steps

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model's forward returns for these arguments; all ranks are called alike.

        Raises:
            UsageError: an argument that the bundle does not take, or of a shape or type that none
                of its variants has.
            RunFailed: ranks are given inputs of different variants.
        """
        variant, given = self.executor.picked(named(self.manifest, args, kwargs))
        outputs = self.executor.run(variant, given)
        return rebuilt(self.manifests[variant].forward.returned, outputs)

    def use_lora(self, asked: Asked) -> None:
        """Use these LoRA sets from the next call on; all ranks ask for the same.

        A set that was used before is bound again in milliseconds; the first time it is loaded.

        Args:
            asked: a set's name, several names, or strengths by name; ``None``: no set.

        Raises:
            ConvertError: see :meth:`.executors.Executor.use_lora`.
        """
        self.executor.use_lora(asked)

    def close(self) -> None:
        """Free everything; a second time it does nothing."""
        self.executor.close()

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open(  # noqa: A001  named as what it does
    bundle: str | Path,
    *,
    rank: int | None = None,
    communicator: Any = None,
    executor: str = "auto",
    device: str | None = None,
    compiled: bool = False,
    graph: bool = False,
    verify: bool = True,
    lora: Asked = None,
    variant: str | None = None,
    step_cache: float | None = None,
) -> Opened:
    """Open one rank of a bundle, to be called as the model was; every rank of its world does it.

    ``torch.distributed`` must have been initialised with as many ranks as the bundle has, unless
    that is one or a ``communicator`` is given.

    Args:
        bundle: its folder.
        rank: ``None``: this process's in ``communicator``.
        communicator: of all ranks, see :func:`.executors.open_rank`, as for all that follow.
        executor: ``auto``, ``tensorrt`` or ``torch``.
        device: such as ``cuda:1``.
        compiled: torch's program through ``torch.compile``.
        graph: forwards as a CUDA graph.
        verify: whether files are compared with the manifest's SHA-256.
        lora: LoRA sets, see :meth:`Opened.use_lora`.
        variant: the only one to open; ``None``: all, of which every call takes its own by shapes.
        step_cache: threshold below which a call skips the pieces between the first and the last;
            ``opened.steps.reset()`` begins another picture.

    Raises:
        ConvertError: see :func:`.executors.open_rank`.
    """
    if rank is None:
        from .groups import group_of  # late: torch

        group = group_of(communicator)
        rank = 0 if group is None else group.rank()
    return Opened(
        open_rank(
            Path(bundle), rank, executor=executor, device=device, communicator=communicator,
            compiled=compiled, graph=graph, verify=verify, lora=lora, variant=variant,
            step_cache=step_cache,
        )
    )  # fmt: skip


def named(manifest: Manifest, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Positional arguments by the names of forward's parameters.

    Raises:
        UsageError: there are too many, or one is given twice.
    """
    names = manifest.forward.arguments
    if len(args) > len(names):
        raise UsageError(f"{len(args)} positional arguments; forward takes {', '.join(names)}.")
    named = dict(zip(names, args, strict=False))
    twice = sorted(set(named) & set(kwargs))
    if twice:
        raise UsageError(f"{twice[0]} is given twice, by its place and by its name.")
    return {**named, **kwargs}


def rebuilt(tree: Returned, outputs: Mapping[str, Tensor]) -> Any:
    """The tensors in the containers in which forward returns them."""
    if tree.kind == "tensor":
        assert tree.name is not None
        return outputs[tree.name]
    if tree.kind == "none":
        return None
    items = [rebuilt(one, outputs) for one in tree.items]
    if tree.kind in ("mapping", "fields"):
        kind = dict if tree.kind == "mapping" else Fields
        return kind(zip(tree.keys, items, strict=True))
    return tuple(items) if tree.kind == "tuple" else items
