"""Every `cosmic` command in docs/cosmic.md works as it is written there, in that order and in one folder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

import cosmic.cli
from refat.data.organism import direction_prompts

PAGE = Path(__file__).parents[1] / "docs" / "cosmic.md"
PROMPTS = 30
"""Per class, where the page takes 400: enough for each command to have something to do."""


def commands(page: Path) -> list[list[str]]:
    """The commands in the page's indented and fenced blocks, as arguments."""
    blocks = page.read_text(encoding="utf-8").split("```")[1::2]
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("cosmic ")]


def test_commands_of_the_page_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, texts in zip(("harmful", "harmless"), direction_prompts(PROMPTS), strict=True):
        Path(f"{name}.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
    found = commands(PAGE)
    assert {arguments[1] for arguments in found} == {"extract", "explain", "steer", "compare", "harmfulness"}
    for arguments in found:
        monkeypatch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as ended:
            cosmic.cli.main()
        assert not ended.value.code, arguments
        if "--output" in arguments:
            written = Path(arguments[arguments.index("--output") + 1])
            assert any(written.glob("*.json")), arguments
            assert any(written.rglob("*.png")) or arguments[1] == "harmfulness", arguments
