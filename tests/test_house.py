"""The house rules that linters do not know: the environment, lengths, and late imports.

Who may import whom is import-linter's (``pyproject.toml``).
"""

import ast
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple, TypeVar

import pytest

from tests.conftest import ROOT

MODULES = sorted(
    path for folder in ("cp_convert", "converters") for path in (ROOT / folder).rglob("*.py")
)

AT_THE_TOP = ("cli", "diffusers", "runtime")
"""Wings that know which rank they are; everywhere else the rank is an argument."""
LONGEST_FUNCTION, LONGEST_FILE = 50, 350
TABLES = {"cp_convert/sharding/rules.py": "_table", "cp_convert/prove/layers.py": "LAYERS"}
"""Longer files: one function a row, and the name of the table that lists them."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


Found = TypeVar("Found")


def wherever(look: Callable[[Path], Found]) -> dict[str, Found]:
    """By module, what is found there, where something is; one test for hundreds of files."""
    assert len(MODULES) > 200
    return {name_of(path): found for path in MODULES if (found := look(path))}


# --- ranks are arguments --------------------------------------------------------------------------

ENVIRONMENT = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
PLACES = {
    "get_rank", "get_world_size", "get_node_local_rank", "get_group_rank", "init_process_group",
    "get_process_group_ranks", "is_initialized", "new_group", "DeviceMesh", "init_device_mesh",
}  # fmt: skip


def asked(tree: ast.AST) -> Iterator[str]:
    """Everything that tells a process its surroundings, with its line."""
    for node in ast.walk(tree):
        names = {
            ast.Attribute: lambda n: [n.attr],
            ast.Name: lambda n: [n.id],
            ast.ImportFrom: lambda n: [alias.name for alias in n.names],
        }.get(type(node), lambda _: [])(node)
        yield from (f"{n}, line {node.lineno}" for n in names if n in ENVIRONMENT | PLACES)  # type: ignore[attr-defined]


def test_only_the_top_asks_who_it_is() -> None:
    found = wherever(lambda path: list(asked(tree_of(path))))
    assert {name.split("/")[1] for name in found} <= set(AT_THE_TOP), found


@pytest.mark.parametrize(
    "text",
    ["import os\nos.environ['RANK']", "from os import environ", "from os import getenv as g",
     "import torch.distributed as d\nd.get_rank()", "from torch.distributed import get_world_size"],
)  # fmt: skip
def test_asking_is_noticed(text: str) -> None:
    assert list(asked(ast.parse(text)))


# --- lengths --------------------------------------------------------------------------------------


def lines(node: ast.AST) -> int:
    return node.end_lineno - node.lineno + 1  # type: ignore[attr-defined, no-any-return]


def functions(tree: ast.Module) -> list[ast.FunctionDef]:
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def test_functions_are_short() -> None:
    def long(path: Path) -> dict[str, int]:
        found = {f.name: lines(f) for f in functions(tree_of(path))}
        return {name: length for name, length in found.items() if length > LONGEST_FUNCTION}

    assert not wherever(long)


def test_files_are_short() -> None:
    long = wherever(lambda path: len(path.read_text().splitlines()) > LONGEST_FILE)
    assert not set(long) - set(TABLES)


def share_of_rows(tree: ast.Module, table: str) -> float:
    """How much of a file's functions are the rows of its table, by lines."""
    rows = next(
        node
        for node in tree.body
        if table in (getattr(node, "name", ""), getattr(getattr(node, "target", None), "id", ""))
    )
    named = {node.id for node in ast.walk(rows) if isinstance(node, ast.Name)} | {table}
    held = [f for f in tree.body if isinstance(f, ast.FunctionDef)]
    return sum(lines(f) for f in held if f.name in named) / sum(map(lines, held))


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_tables(name: str) -> None:
    path = ROOT / name
    assert len(path.read_text().splitlines()) > LONGEST_FILE, "no exception is needed any more"
    assert share_of_rows(tree_of(path), TABLES[name]) > 0.75


def test_not_everything_is_a_table() -> None:
    assert share_of_rows(tree_of(ROOT / "cp_convert/engine/readback.py"), "_READERS") < 0.75


# --- late imports ---------------------------------------------------------------------------------


class Late(NamedTuple):
    """An import that is not done when its module is imported, or is for the type checker alone."""

    line: int
    targets: tuple[str, ...]


class Imports(NamedTuple):
    """Of one module: what it imports at once, and what later."""

    at_once: set[str]
    late: list[Late]


NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in MODULES}


def known(dotted: str) -> str | None:
    """The module of ours that a dotted name is, or is in."""
    for name in (dotted, dotted.rpartition(".")[0]):
        for module in (name, f"{name}.__init__"):
            if module in NAMES:
                return module
    return None


def targets(node: ast.Import | ast.ImportFrom, module: str) -> set[str]:
    """The modules of ours that one import statement in ``module`` imports."""
    if isinstance(node, ast.Import):
        found = [known(alias.name) for alias in node.names]
    else:
        parts = module.split(".")
        base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
        origin = ".".join(filter(None, (base, node.module)))
        found = [known(f"{origin}.{alias.name}") for alias in node.names]
    return {name for name in found if name is not None}


def is_late(scope: ast.AST) -> bool:
    """Whether what stands in ``scope`` is not run when the module is imported."""
    if isinstance(scope, ast.If):
        return "TYPE_CHECKING" in ast.dump(scope.test)
    return isinstance(scope, ast.FunctionDef)


def imports(tree: ast.Module, module: str) -> Imports:
    late_nodes = {node for scope in ast.walk(tree) if is_late(scope) for node in ast.walk(scope)}
    at_once, late = set[str](), list[Late]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            found = targets(node, module)
            if node in late_nodes:
                late.append(Late(node.lineno, tuple(sorted(found))))
            else:
                at_once |= found
    return Imports(at_once - {module}, late)


def reached(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    """Everything that importing ``start`` imports at once, and that in turn."""
    seen, waiting = set[str](), [start]
    while waiting:
        one = waiting.pop()
        if one not in seen:
            seen.add(one)
            waiting += edges.get(one, ())
    return seen


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@cache
def imports_of(path: Path) -> Imports:
    return imports(tree_of(path), dotted(path))


def at_once() -> dict[str, set[str]]:
    return {dotted(path): imports_of(path).at_once for path in MODULES}


def test_modules_form_no_circle() -> None:
    edges = at_once()
    circles = [n for n in edges if any(n in reached(other, edges) for other in edges[n])]
    assert not circles


def test_no_late_import_hides_a_circle() -> None:
    edges = at_once()
    hidden = [
        (dotted(path), target)
        for path in MODULES
        for late in imports_of(path).late
        for target in late.targets
        if dotted(path) in reached(target, edges)
    ]
    assert not hidden


def unexplained(text: str, late: list[Late]) -> list[int]:
    """Lines of late imports without a comment that says why, beside them or above their block."""
    told = text.splitlines()
    return [one.line for one in late if not _says_why(told, one.line - 1)]


def _says_why(told: list[str], at: int) -> bool:
    if "# late: " in told[at].lower():
        return True
    begins = told[at - 1].strip()
    if begins.startswith("if TYPE_CHECKING:"):
        return "# " in begins
    inside = begins.startswith(("#", "from ", "import ")) or (not begins and at > 1)
    return inside and _says_why(told, at - 1)


def test_late_imports_say_why() -> None:
    assert not wherever(lambda path: unexplained(path.read_text(), imports_of(path).late))


def test_late_imports_are_noticed() -> None:
    text = "def f():\n    from .pipeline import convert\n"
    found = imports(ast.parse(text), "cp_convert.job")
    assert found == Imports(set(), [Late(2, ("cp_convert.pipeline",))])
    assert "cp_convert.job" in reached("cp_convert.pipeline", at_once())
    assert unexplained(text, found.late) == [2]
    assert not unexplained(text.replace("convert\n", "convert  # late: torch\n"), found.late)
    assert not unexplained("# Late: torch.\nimport x\n\nfrom . import y\n", [Late(4, ())])
    assert unexplained("import z  # late: torch\nx = 1\n\nfrom . import y\n", [Late(4, ())])
