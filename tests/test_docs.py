"""Documentation that is generated, or that names things which must exist."""

import ast
import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT

PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "configs" / "README.md",
]
SOURCES = [
    path
    for folder in ("cp_convert", "converters", "benchmarks", "examples")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
MODULES = [path for path in SOURCES if path.relative_to(ROOT).parts[0] == "cp_convert"]

OURS = r"(?:cp_convert|converters|configs|tests|benchmarks|examples|docs)"
NOT_OURS = {
    "model.py",  # the user's
    "docs/multi_device.md",  # Triton's backend's
    "benchmarks/models.json",  # what benchmarks write
    "benchmarks/meshes.json",
    "benchmarks/quantized_models.json",
}


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


def test_the_command_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.reference(), "run python docs/generate.py"


def test_the_readmes_commands_are_the_makefiles() -> None:
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    commands = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in commands)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_nothing_was_left_to_fill_in() -> None:
    assert not [p.name for p in PAGES if "@@" in p.read_text()]


# --- what pages and docstrings name ---------------------------------------------------------------


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    targets = set(re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()))
    assert not [target for target in sorted(targets) if not (page.parent / target).exists()]


def present(text: str) -> str:
    """Without what a changelog tells of finished releases, whose files may be gone."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    return "".join(p for p in parts if not re.match(r"## v?\d", p) or "unreleased" in p)


def missing_files(text: str, *beside: Path) -> list[str]:
    """Paths from the repository's root that lead nowhere, and modules in backticks that are none.

    Such a module is named from the package or its wing on, by its name alone, or stands
    ``beside``. ``NAME`` is a placeholder, ``*`` any file.
    """
    paths = set(re.findall(rf"(?<![\w./-]){OURS}/[\w./*-]*\w\.(?:py|md|toml|json|yml)\b", text))
    modules = set(re.findall(r"`([\w./-]+\.py)`", text)) - paths
    places = (ROOT, ROOT / "cp_convert", *(ROOT / "cp_convert").glob("*/"), *beside)
    missing = {path for path in paths if not any(ROOT.glob(path))}
    missing |= {name for name in modules if not any((p / name).is_file() for p in places)}
    return sorted(name for name in missing - NOT_OURS if "NAME" not in name)


@every_page
def test_files_that_pages_name_exist(page: Path) -> None:
    assert not missing_files(present(page.read_text()))


def test_files_that_the_code_names_exist() -> None:
    assert len(SOURCES) > 300
    missing = {name_of(path): missing_files(path.read_text(), path.parent) for path in SOURCES}
    assert not {name: found for name, found in missing.items() if found}


def exists(name: str, *scopes: Any) -> bool:
    """Whether a dotted name means something from one of ``scopes`` on; ``None``: by itself."""
    for scope in scopes:
        head, *rest = name.split(".")
        try:
            found = importlib.import_module(head) if scope is None else _part(scope, head)
            for part in rest:
                found = _part(found, part)
        except (ImportError, AttributeError):
            continue
        return True
    return False


def _part(scope: Any, name: str) -> Any:
    if isinstance(scope, ModuleType) and not hasattr(scope, name):
        return importlib.import_module(f"{scope.__name__}.{name}")
    return getattr(scope, name)


@every_page
def test_modules_that_pages_name_exist(page: Path) -> None:
    text = present(page.read_text())
    names = set(re.findall(r"(?<![\w./-])cp_convert\.[\w.]*\w", text))
    assert not [name for name in sorted(names) if not exists(name, None)]


def referred(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    """Every ``:role:`name``` in a module's strings, and the class that it stands in."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            around = [c.name for c in classes if c.lineno <= node.lineno <= (c.end_lineno or 0)]
            for name in re.findall(
                r":(?:mod|func|class|data|meth|attr|exc):`~?([\w.]+)", node.value
            ):
                yield name, around[0] if around else None


def test_what_docstrings_refer_to_exists() -> None:
    """Whole names, names that begin at the module's folder, and names of the module's own."""
    assert len(MODULES) > 200
    missing = {name_of(path): not_there(path) for path in MODULES}
    assert not {name: found for name, found in missing.items() if found}


def not_there(path: Path) -> list[str]:
    parts = path.relative_to(ROOT).with_suffix("").parts
    own = importlib.import_module(".".join(parts).removesuffix(".__init__"))
    missing = []
    for name, around in referred(ast.parse(path.read_text())):
        up = len(name) - len(name.lstrip("."))
        scopes = [None, own, getattr(own, around or "", None)]
        if up:
            scopes = [importlib.import_module(".".join(parts[:-up]))]
        if not exists(name.lstrip("."), *scopes):
            missing.append(name)
    return missing


def test_what_does_not_exist_is_noticed() -> None:
    text = "`links.py`, tests/gone.py, `cp_convert/ir/ops.py`, `ops.py`, `ir/ops.py`, `ir/mesh.py`"
    assert missing_files(text) == ["ir/mesh.py", "links.py", "tests/gone.py"]
    assert not exists("cp_convert.render", None)
    assert exists("cp_convert.ir.ops.shard", None)
    assert present("# C\n\n## 0.2.0 - unreleased\na\n## 0.1.0 - 2026-01-01\nb\n").endswith("a\n")
    assert list(referred(ast.parse('class A:\n    """:mod:`.b`"""'))) == [(".b", "A")]
