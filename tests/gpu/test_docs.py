"""The code of the documentation runs on a GPU: all blocks of a page, in order."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "tests" / "pages.py"
PAGES = [
    page
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    if "```python" in page.read_text(encoding="utf-8")
    or "```sh" in page.read_text(encoding="utf-8")
]


def run(page: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(RUNNER), str(page), "--gpu"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


@pytest.fixture(scope="module")
def runs(gpu: torch.device) -> Iterator[dict[Path, Future[subprocess.CompletedProcess[str]]]]:
    """All pages, a few at a time: most of each is the start of a process."""
    with ThreadPoolExecutor(4) as pool:
        yield {page: pool.submit(run, page) for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=[p.relative_to(ROOT).as_posix() for p in PAGES])
def test_the_blocks_of_a_page_run_in_order(
    page: Path, runs: dict[Path, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = runs[page].result()
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"


BROKEN = {
    "a wrong value": '```python gpu\nimport torch\nassert torch.ones(1, device="cuda") == 2\n```\n',
    "a name that is not there": "```python\nimport cumempool\ncumempool.no_such_name\n```\n",
    "a command that fails": "```sh gpu\ncumempool doctor --no-such-option\n```\n",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_block_is_found(text: str, tmp_path: Path, gpu: torch.device) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert run(page).returncode != 0
