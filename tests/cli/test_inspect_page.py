"""`inspect --html`: one page, with everything of the manifest and nothing of anybody else's."""

from html.parser import HTMLParser
from pathlib import Path

import msgspec
from click.testing import CliRunner

from cp_convert import bundle
from cp_convert.cli import cli
from cp_convert.show.bundle_page import bundle_page
from tests.bundle.test_folder import written

VOID = {"meta", "rect", "br"}


class Nesting(HTMLParser):
    """The tags that are open, and all that were met; ends must match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.met: set[str] = set()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.met.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        self.met.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_tells_what_the_manifest_says(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    args = ["inspect", str(written(tmp_path / "out")), "--html", str(page)]
    assert CliRunner().invoke(cli, args, standalone_mode=False).exit_code == 0
    text = page.read_text()
    for part in ("Mesh: cp 2", "rank 1", "2 of 4", "blocks.*.attn", "6 all_to_all", "4.1 kB",
                 "Proven (program)", "1.0e-07", "1.05 MB", "cp-convert x.py"):  # fmt: skip
        assert part in text, part
    assert "http" not in text
    nesting = Nesting()
    nesting.feed(text)
    assert nesting.open == []


def test_nothing_of_the_manifest_is_markup(tmp_path: Path) -> None:
    manifest, _ = bundle.read(written(tmp_path / "out"))
    evil = "<script>&{x}"
    changed = msgspec.structs.replace(
        manifest, command=evil, axes={evil: 2}, groups={evil: [[0, 1]]},
        model=msgspec.structs.replace(manifest.model, name=evil, kind=evil),
        io=[msgspec.structs.replace(one, name=evil) for one in manifest.io],
        attention=[msgspec.structs.replace(a, module=evil) for a in manifest.attention],
        collectives=[msgspec.structs.replace(c, kind=evil) for c in manifest.collectives],
        sharding=[msgspec.structs.replace(s, operator=evil) for s in manifest.sharding],
    )  # fmt: skip
    text = bundle_page(changed)
    nesting = Nesting()
    nesting.feed(text)
    assert "script" not in nesting.met
    assert text.count("&lt;script&gt;&amp;{x}") >= 9
