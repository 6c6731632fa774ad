"""Tables of a packed program whose rows follow the size, as what every size can make for itself.

A program at several sizes comes in, as documents of :mod:`.serialize`, and goes out with operators
in the place of such tables: one number throughout is ``aten.full``, the first rows of the largest
size's table are a slice of that, and zeros behind them are put there. Any other is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import CannotLift
from .serialize import Packed, told_tensor

_ATTRIBUTE: Final = "attribute "
Documents = dict[int, dict[str, Any]]


def rebuilt(
    programs: Mapping[int, Packed], documents: Documents, last: int, refused: str
) -> Documents:
    """The documents without tables whose contents follow the size.

    Args:
        programs: by size; numbers of the largest become everyone's.
        documents: theirs, with the same nodes in the same order.
        last: the largest size of the range.
        refused: what to try where there is no other way.

    Raises:
        CannotLift: a table is neither one number nor the first rows of the largest size's.
    """
    largest = programs[max(programs)].tensors
    for index, node in reversed(list(enumerate(documents[max(programs)]["nodes"]))):
        name = f"{_ATTRIBUTE}{node[2]}"
        if node[0] != "get_attr":
            continue
        tables = {n: one.tensors[name] for n, one in programs.items()}
        if all(_same(one, largest[name]) for one in tables.values()):
            continue
        if all(_is_filled(one, largest[name]) for one in tables.values()):
            documents = {n: _with_full(d, index, tables[n]) for n, d in documents.items()}
            continue
        grown = _grown(tables, largest[name])
        if grown is None:
            raise CannotLift(
                f"a table of the program ({list(largest[name].shape)}) has other numbers from size "
                "to size: it is computed from the size, and not from an input.",
                where=reader(documents[max(programs)], index),
                hint=refused,
            )
        if max(programs) < last:  # whose table has more rows than any that is known
            raise CannotLift(
                f"a table of the program grows with the size, and that of {last} is not known: the "
                f"program was made at {max(programs)}, as it has padding there.",
                where=reader(documents[max(programs)], index),
                hint=f"let the range end at {max(programs)}.",
            )
        documents = {n: _with_rows(d, index, grown, n) for n, d in documents.items()}
    return documents


@dataclass(frozen=True)
class _Grown:
    """A table of which every size has the first rows, and padding behind them.

    Attributes:
        whole: the largest size's.
        dim: along which it grows.
        tables: by size.
        rows: by size, those before the padding.
    """

    whole: Tensor
    dim: int
    tables: Mapping[int, Tensor]
    rows: Mapping[int, int]

    @property
    def is_padded(self) -> bool:
        """Whether any size has padding."""
        return any(one.shape[self.dim] > self.rows[n] for n, one in self.tables.items())


def _same(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return a.data_ptr() == b.data_ptr() or torch.equal(a, b)


def _is_filled(table: Tensor, like: Tensor) -> bool:
    first = like.reshape(-1)[0]
    return table.dtype == like.dtype and bool((table == first).all())


def _grown(tables: Mapping[int, Tensor], whole: Tensor) -> _Grown | None:
    """How the tables follow from the largest, if they do."""
    for one in tables.values():
        if one.dim() != whole.dim() or one.dtype != whole.dtype:
            return None
    dims = {
        dim
        for one in tables.values()
        for dim in range(whole.dim())
        if one.shape[dim] != whole.shape[dim]
    }
    if len(dims) != 1:
        return None
    (dim,) = dims
    rows = {n: _before_zeros(one, dim) for n, one in tables.items()}
    for n, one in tables.items():
        if not torch.equal(one.narrow(dim, 0, rows[n]), whole.narrow(dim, 0, rows[n])):
            return None
    return _Grown(whole, dim, tables, rows)


def _before_zeros(table: Tensor, dim: int) -> int:
    """How many rows there are but for those of zeros at the end."""
    flat = table.movedim(dim, 0).reshape(table.shape[dim], -1)
    real = (flat != 0).any(1).nonzero()
    return int(real[-1]) + 1 if len(real) else 0


def _with_full(document: dict[str, Any], index: int, table: Tensor) -> dict[str, Any]:
    """The node ``index`` as a tensor of one number."""
    _, name, *_, stack = document["nodes"][index]
    dtype, shape = told_tensor(table)
    number = table.reshape(-1)[0].item() if table.numel() else 0
    node = _node(name, "aten.full.default", [shape, number], table, stack)
    node[4] = {"dtype": {"dtype": dtype}}
    nodes = document["nodes"]
    return {**document, "nodes": [*nodes[:index], node, *nodes[index + 1 :]]}


def _with_rows(document: dict[str, Any], index: int, grown: _Grown, n: int) -> dict[str, Any]:
    """The first rows of the node ``index``, which holds the whole table, and padding behind."""
    nodes, dim, table, rows = document["nodes"], grown.dim, grown.tables[n], grown.rows[n]
    op, name, target, args, kwargs, _, stack = nodes[index]
    real = table.narrow(dim, 0, rows)
    new = [
        [op, name, target, args, kwargs, _value(grown.whole), stack],
        _node(f"{name}_rows", "aten.slice.Tensor", [{"node": index}, dim, 0, rows], real, stack),
    ]
    if grown.is_padded:
        zeros = table.narrow(dim, rows, table.shape[dim] - rows)
        dtype, shape = told_tensor(zeros)
        full = _node(f"{name}_zeros", "aten.full.default", [shape, 0], zeros, stack)
        full[4] = {"dtype": {"dtype": dtype}}
        both = [[{"node": index + 1}, {"node": index + 2}], dim]
        new += [full, _node(f"{name}_padded", "aten.cat.default", both, table, stack)]
    rest = [_moved(node, index, len(new) - 1) for node in nodes[index + 1 :]]
    return {**document, "nodes": [*nodes[:index], *new, *rest]}


def _node(name: str, target: str, args: list[Any], like: Tensor, stack: int) -> list[Any]:
    return ["call_function", name, target, args, {}, _value(like), stack]


def _value(table: Tensor) -> list[Any]:
    dtype, shape = told_tensor(table)
    strides = list(torch.empty(shape, device="meta").stride())
    return ["tensor", [dtype, shape, strides]]


def _moved(told: Any, index: int, count: int) -> Any:
    """With ``count`` more nodes behind ``index``, the last of which is read in its place."""
    if isinstance(told, list | tuple):
        return [_moved(one, index, count) for one in told]
    if isinstance(told, dict):
        if told.keys() == {"node"}:
            return {"node": told["node"] + (count if told["node"] >= index else 0)}
        return {key: _moved(one, index, count) for key, one in told.items()}
    return told


def reader(document: Mapping[str, Any], index: int) -> str:
    """Where the model reads the node ``index``."""
    nodes = document["nodes"]
    found = (i for i, node in enumerate(nodes) if _reads(node[3:5], index))
    return place(document, next(found, index))


def _reads(told: Any, index: int) -> bool:
    if isinstance(told, dict):
        return told == {"node": index} or any(_reads(one, index) for one in told.values())
    return isinstance(told, list) and any(_reads(one, index) for one in told)


def place(document: Mapping[str, Any], index: int) -> str:
    """The module and the source line of the node ``index``."""
    modules, trace = document["stacks"][document["nodes"][index][-1]]
    path = (modules[-1][1] if modules else "") or "model"
    lines = [line.strip() for line in (trace or "").splitlines()]
    own = [one for one in lines if one.startswith('File "') and "/torch/" not in one]
    if not own:
        return f"{path} (source unknown)"
    return f"{path} ({own[-1].split(chr(34))[1]}:{own[-1].split('line ')[1].split(',')[0]})"
