"""The workflow under examples/ci: its steps are run as the script that they are."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.conftest import EXAMPLES, ROOT, shorter

pytestmark = pytest.mark.engine

TOOL = """\
if __name__ == "__main__":
    import sys
    from cp_convert import cli
    if sys.argv[1] == "convert":
        import cp_convert.engine.worker  # which it comes to itself, and once is enough
        from tests.server import fork_server
        fork_server()
    cli.main()
"""


def test_the_workflow_runs(tmp_path: Path) -> None:
    job = yaml.safe_load((EXAMPLES / "ci" / "convert.yml").read_text())["jobs"]["convert"]
    steps = [s["run"] for s in job["steps"] if "run" in s and s["name"] != "install"]
    assert len(steps) == 3
    (tmp_path / "examples").mkdir()
    assert shorter("plain_dit", tmp_path / "examples") == tmp_path / job["env"]["MODEL"]
    tool = tmp_path / "bin" / "cp-convert"
    tool.parent.mkdir()
    tool.write_text(f"#!{sys.executable}\n{TOOL}")
    tool.chmod(0o755)
    told = tmp_path / "step.md"
    env = os.environ | job["env"] | {
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "GITHUB_STEP_SUMMARY": str(told),
    }  # fmt: skip
    for step in steps:  # as the runner does it: each in a shell of its own
        subprocess.run(["bash", "-e", "-c", step], cwd=tmp_path, env=env, check=True)
    assert "passed" in told.read_text()
    assert ElementTree.parse(tmp_path / "convert.xml").find(".//failure") is None
    assert "Proven" in (tmp_path / "bundle.html").read_text()
