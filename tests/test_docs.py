"""Documentation that is generated, or that names things which must exist."""

import importlib.util
import re

import pytest

from tests.conftest import ROOT


def test_the_command_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.TARGET.read_text() == module.reference(), "run python docs/generate.py"


@pytest.mark.parametrize("page", sorted(p.name for p in ROOT.glob("*.md")))
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", text)
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing


def test_the_readmes_commands_are_the_makefiles() -> None:
    readme, makefile = ((ROOT / name).read_text() for name in ("README.md", "Makefile"))
    commands = re.findall(r"^make (\w+)", readme, re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(re.search(rf"^{name}:", makefile, re.MULTILINE) for name in commands)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_nothing_was_left_to_fill_in() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert not [p.name for p in pages if "@@" in p.read_text()]
