"""What a trace tells besides the program: names, frozen arguments, what became of the plan."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec


@dataclass(frozen=True)
class Cut:
    """One normalised line of a plan: one tensor at one module boundary.

    Attributes:
        kind: ``"split"`` or ``"gather"``.
        module: the module's path, wildcards resolved.
        on_output: whether the tensor is an output of the module.
        argument: the ``forward`` argument's name, or the output's index.
        element: the index inside a list or tuple argument, or ``None``.
        dim: the tensor dimension that holds the sequence.
        expected_dims: see :class:`cp_convert.ContextParallelInput`.
        line: where in the plan it stands, such as ``cp_plan['blocks.*']['x']``; not compared.
    """

    kind: str
    module: str
    on_output: bool
    argument: str | int
    element: int | None
    dim: int
    expected_dims: int | None
    line: str = field(default="", compare=False)

    @property
    def tensor(self) -> str:
        """The tensor in words, such as ``input hidden_states`` or ``output 0``."""
        element = "" if self.element is None else f"[{self.element}]"
        return f"{'output' if self.on_output else 'input'} {self.argument}{element}"


@dataclass(frozen=True)
class Applied:
    """What became of one cut of the plan while tracing.

    Attributes:
        cut: the line of the plan.
        global_size: along the cut dimension; ``None`` when it was not applied.
        reason: why it was not applied.
    """

    cut: Cut
    global_size: int | None
    reason: str | None


class Returned(msgspec.Struct, frozen=True):
    """What forward returns: one node of the tree.

    Attributes:
        kind: ``tensor``, ``none`` (nothing that changes), ``tuple``, ``list``, ``mapping``, or
            ``fields`` for an object with named fields, such as a dataclass.
        name: of a tensor's binding, or of an object's class.
        keys: of a mapping's or an object's items.
        items: what is within, in order.
    """

    kind: str
    name: str | None = None
    keys: tuple[str, ...] = ()
    items: tuple[Returned, ...] = ()


class Signature(msgspec.Struct, frozen=True):
    """What a trace tells besides the program.

    Attributes:
        returned: what forward returns.
        parameters: the model's own names of its parameters, by placeholder.
        frozen: arguments that are no tensors, and are frozen into the program, as ``repr``.
        digests: of those among them that hold tensors, which were frozen by name.
        applied: what became of the plan's lines.
    """

    parameters: dict[str, str]
    frozen: dict[str, str]
    digests: dict[str, str]
    applied: tuple[Applied, ...]
    returned: Returned
