"""`cumempool report`: the page, looked at in a browser, the pictures, and torch's visualizer."""

from __future__ import annotations

import json
import pickle
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import GRANULE, MakeAllocator, filled
from PIL import Image
from refusals import refuses
from torch.cuda import _memory_viz

from cumempool import CuMemAllocator, InUseError, InvalidArgumentError
from cumempool.tools import page
from cumempool.tools.cli import main

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def work(alloc: CuMemAllocator) -> list[torch.Tensor]:
    """Several tags, one of them named to break a page, in all three states; a failure as well."""
    tensors = [filled(alloc, GRANULE * size, "weights") for size in (1, 3, 2)]
    tensors += [filled(alloc, GRANULE - 100, "<b>kv</b>"), filled(alloc, GRANULE, "awake")]
    alloc.sleep(offload_tags="weights", tags=("weights", "<b>kv</b>"))
    alloc.wake_up()
    with alloc.pin("weights", holder="somebody"), pytest.raises(InUseError):
        alloc.sleep(tags="weights")
    alloc.sleep(offload_tags="weights", tags=("weights", "<b>kv</b>"))
    return tensors


@pytest.fixture
def snapshot(alloc: CuMemAllocator, tmp_path: Path) -> Path:
    tensors = work(alloc)
    alloc.save_snapshot(tmp_path / "snapshot.json")
    del tensors
    return tmp_path / "snapshot.json"


def cells(html: str, table: str) -> list[list[str]]:
    body = html[html.index(f'<table id="{table}"') :]
    body = body[: body.index("</table>")]
    rows = re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)
    return [re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL) for row in rows][1:]


def test_the_page_has_every_tag_with_its_bytes(snapshot: Path) -> None:
    html = page.to_html(page.load(snapshot))
    rows = {row[0]: row[1:] for row in cells(html, "tags")}
    assert list(rows) == ["&lt;b&gt;kv&lt;/b&gt;", "awake", "weights"]
    assert rows["weights"][:4] == ["3", "-", "12.00 MiB", "-"]
    assert rows["awake"][:4] == ["1", "2.00 MiB", "-", "-"]
    assert rows["&lt;b&gt;kv&lt;/b&gt;"][:6] == ["1", "-", "-", "2.00 MiB", "2.00 MiB", "100 bytes"]
    assert rows["weights"][-1] == "pinned"
    assert "<b>kv" not in html


def test_the_page_has_every_transition_with_its_rate(snapshot: Path) -> None:
    html = page.to_html(page.load(snapshot), link_gb_per_s=1e9)
    rows = cells(html, "transitions")
    assert [row[1] for row in rows] == ["sleep", "wake_up", "sleep", "sleep"]
    assert rows[0][3:7] == ["14.00 MiB", "-", "12.00 MiB", "-"]
    assert rows[1][4] == "14.00 MiB"
    assert "InUseError" in rows[2][3]
    assert "somebody" in rows[2][3]
    assert rows[3][6] == "12.00 MiB", "clean"
    assert float(rows[0][7]) > 0
    assert rows[0][8] == "0%"
    fastest = page.to_html(page.load(snapshot))
    assert "100%" in [row[-1] for row in cells(fastest, "transitions") if len(row) == 9]
    assert "of the fastest" in fastest


def test_the_page_loads_nothing(snapshot: Path) -> None:
    html = page.to_html(page.load(snapshot))
    assert html.count("<svg") == 2
    assert not re.search(r"<(script|link|img|iframe)|@import|url\(http", html)


def test_a_trace_is_rendered_as_well(alloc: CuMemAllocator, tmp_path: Path) -> None:
    with alloc.record(tmp_path / "trace.jsonl"):
        tensors = work(alloc)
    alloc.wake_up()
    record = page.load(tmp_path / "trace.jsonl")
    assert [event["operation"] for event in record.events] == ["sleep", "wake_up", "sleep", "sleep"]
    html = page.to_html(record)
    assert html.startswith("<!doctype html>")
    assert len(cells(html, "transitions")) == 4
    assert '<table id="tags"' not in html
    del tensors


def test_a_trace_on_a_full_disk_ends_and_nothing_else(
    alloc: CuMemAllocator, caplog: pytest.LogCaptureFixture
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("there is no /dev/full here")
    tensor = filled(alloc, GRANULE, "data")
    try:
        with alloc.record("/dev/full"):
            alloc.sleep(tags="data")
            alloc.wake_up()
    except OSError:
        pass  # its header could not be written
    assert alloc.stats().awake_bytes == alloc.stats().physical_bytes
    del tensor


def test_an_empty_snapshot_has_a_page(alloc: CuMemAllocator, tmp_path: Path) -> None:
    alloc.save_snapshot(tmp_path / "snapshot.json")
    assert 'id="empty"' in page.to_html(page.load(tmp_path / "snapshot.json"))
    assert pickle.loads(page.to_torch(page.load(tmp_path / "snapshot.json")))["segments"] == []


def test_the_reason_of_out_of_memory_is_at_the_top(snapshot: Path) -> None:
    record = json.loads(snapshot.read_text())
    snapshot.write_text(json.dumps({**record, "error": "no <room>"}))
    assert '<p class="error" id="error">no &lt;room&gt;</p>' in page.to_html(page.load(snapshot))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is damaged"),
        ("[]", "neither"),
        ("{}", "neither"),
        ('{"format": "cumempool snapshot 1", "time": 0, "process": 1}', "is damaged"),
        ('{"format": "cumempool trace 1", "time": 0, "process": 1}\n{', "is damaged"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "file").write_text(text)
    with refuses(InvalidArgumentError, names=(str(tmp_path / "file"), said)):
        page.load(tmp_path / "file")
    result = CliRunner().invoke(main, ["report", str(tmp_path / "file")])
    assert result.exit_code == 1
    assert said in result.output


# ---- the command, and other formats ------------------------------------------------------------


def test_the_command_writes_what_it_is_asked_for(snapshot: Path, tmp_path: Path) -> None:
    run("report", snapshot)
    assert "Address map" in Path(f"{snapshot}.html").read_text()
    out = tmp_path / "out.html"
    pickled = tmp_path / "out.pickle"
    said = run("report", snapshot, "-o", out, "--torch", pickled, "--link", 55)
    assert said.split() == [str(out), str(pickled)]
    assert "of the link" in out.read_text()


def test_a_snapshot_of_a_running_process(
    make_allocator: MakeAllocator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr("cumempool._pool.publishing._INTERVAL", 0.02)
    alloc = make_allocator(publish=True)
    tensors = work(alloc)
    assert "5 allocations" in run("snapshot", tmp_path / "taken.json")
    run("report", tmp_path / "taken.json")
    result = CliRunner().invoke(main, ["snapshot", str(tmp_path / "no.json"), "--process", "1"])
    assert result.exit_code == 1
    assert "there are: none" in result.output
    del tensors


def test_torchs_visualizer_takes_it(snapshot: Path) -> None:
    data = pickle.loads(page.to_torch(page.load(snapshot)))
    assert len(data["segments"]) == 5
    by_frame: dict[str, int] = {}
    for segment in data["segments"]:
        (block,) = segment["blocks"]
        name = block["frames"][0]["filename"]
        by_frame[name] = by_frame.get(name, 0) + segment["total_size"]
    assert by_frame["tag weights"] == 6 * GRANULE
    assert "html" in _memory_viz.segment_plot(data)
    summary: Any = _memory_viz.segsum(data)
    assert "seg" in summary


# ---- in a browser ------------------------------------------------------------------------------


def browse(html: Path, *options: str) -> str:
    assert BROWSER is not None
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [f"--user-data-dir={html.parent / 'profile'}", *options, html.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


@pytest.mark.extensive
@pytest.mark.skipif(BROWSER is None, reason="no chromium is installed to look at the page with")
@pytest.mark.parametrize("width", [1280, 480])
def test_a_browser_shows_the_page(snapshot: Path, tmp_path: Path, width: int) -> None:
    html = tmp_path / "page.html"
    run("report", snapshot, "-o", html, "--link", 55)
    text = browse(html, "--dump-dom", f"--window-size={width},2400")
    assert len(cells(text, "tags")) == 3
    assert len(cells(text, "transitions")) == 4
    shot = tmp_path / "shot.png"
    browse(html, f"--screenshot={shot}", f"--window-size={width},2400")
    with Image.open(shot) as image:
        assert image.width == width
        colours = image.convert("RGB").getcolors(1 << 24)
        assert colours is not None
        drawn = {colour for _, colour in colours}
        # The colours of the tags, as the address map has them.
        assert {(0, 114, 178), (230, 159, 0), (0, 158, 115)} <= drawn
        white = next(count for count, colour in colours if colour == (255, 255, 255))
        assert white < 0.97 * image.width * image.height
