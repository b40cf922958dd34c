"""The commands that the documents show, run as a reader would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parents[1]


def commands(document: str) -> list[str]:
    """The commands of a document, block by block."""
    tokens = MarkdownIt("commonmark").enable("table").parse((ROOT / document).read_text())
    return [token.content for token in tokens if token.type == "code_block"]


def run_commands(block: str, folder: Path, seconds: float) -> str:
    """What the commands of `block` print, with `folder` as the current directory. Fails a test at
    the first that fails."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", block],
        cwd=folder,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=seconds,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}"
    return done.stdout
