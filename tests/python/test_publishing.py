"""Statistics for other processes, `cumempool top`, and the Prometheus collector."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import GRANULE, MakeAllocator, RunPython, filled
from prometheus_client import CollectorRegistry, generate_latest
from refusals import refuses
from rich.console import Console

from cumempool import CumempoolError, InvalidArgumentError, UnknownTagError
from cumempool._pool import publishing
from cumempool._pool.publishing import Publisher, published, request_snapshot
from cumempool.integrations.prometheus import CuMemCollector
from cumempool.tools import top
from cumempool.tools.cli import main


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(publishing, "_INTERVAL", 0.02)
    return tmp_path


def soon(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_statistics_are_published_and_kept_up_to_date(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(publish=True)
    tensor = filled(alloc, GRANULE, "data")
    soon(lambda: "data" in published()[0].stats["tags"])
    alloc.sleep(tags="data")
    soon(lambda: published()[0].stats["last_event"] is not None)
    (one,) = published()
    assert one.process == os.getpid()
    assert one.stats["tags"]["data"]["backed_up_bytes"] == GRANULE
    assert one.stats["last_event"]["operation"] == "sleep"
    del tensor
    alloc.close()
    assert published() == []


def test_the_folder_is_of_this_user_alone(make_allocator: MakeAllocator, runtime: Path) -> None:
    make_allocator(publish=True)
    (folder,) = runtime.iterdir()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.chmod(0o755)
    with refuses(InvalidArgumentError, names=(str(folder), "chmod 700")):
        published()
    folder.chmod(0o700)


def _open_to_others(folder: Path) -> None:
    folder.mkdir(mode=0o755)


def _dangling(folder: Path) -> None:
    folder.symlink_to(folder.parent / "nowhere")


def _a_file(folder: Path) -> None:
    folder.touch(mode=0o600)


@pytest.mark.parametrize("spoil", [_open_to_others, _dangling, _a_file])
def test_a_folder_that_cannot_be_used_stops_no_constructor(
    make_allocator: MakeAllocator,
    runtime: Path,
    caplog: pytest.LogCaptureFixture,
    spoil: Callable[[Path], None],
) -> None:
    spoil(runtime / f"cumempool-{os.getuid()}")
    alloc = make_allocator(publish=True)
    alloc.empty(1)
    alloc.close()
    assert [r.message.partition(":")[0] for r in caplog.records if r.levelname == "WARNING"] == [
        "statistics are not published"
    ]


def test_a_full_disk_stops_no_constructor(
    make_allocator: MakeAllocator,
    runtime: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(path: Path, text: str, **options: object) -> int:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, "write_text", full)
    make_allocator(publish=True).empty(1)
    assert "No space left on device" in caplog.text
    (folder,) = runtime.iterdir()
    assert list(folder.iterdir()) == []


def test_a_close_survives_the_loss_of_the_folder(
    make_allocator: MakeAllocator, runtime: Path
) -> None:
    alloc = make_allocator(publish=True)
    (folder,) = runtime.iterdir()
    shutil.rmtree(folder)
    folder.touch()
    alloc.close()


def test_another_process_reads_it_and_asks_for_a_snapshot(
    make_allocator: MakeAllocator, run_python: RunPython, tmp_path: Path
) -> None:
    alloc = make_allocator(publish=True)
    tensor = filled(alloc, GRANULE, "data")
    soon(lambda: "data" in published()[0].stats["tags"])
    done = run_python(
        dedent("""
        import json
        from cumempool._pool.publishing import published, request_snapshot

        (one,) = published()
        print(json.dumps(request_snapshot(one)))
        """)
    )
    record = json.loads(done.out)
    assert record["process"] == os.getpid()
    assert [info["address"] for info in record["allocations"]] == [tensor.data_ptr()]


def test_files_of_dead_processes_are_removed(run_python: RunPython, runtime: Path) -> None:
    run_python(
        dedent("""
        import os
        from cumempool import CuMemAllocator, CuMemConfig

        allocator = CuMemAllocator(CuMemConfig(driver="host", publish=True))
        os._exit(0)
        """)
    )
    (folder,) = runtime.iterdir()
    assert list(folder.iterdir())
    assert published() == []
    assert not list(folder.iterdir())


def test_files_of_processes_of_another_pid_namespace_are_left_alone(
    make_allocator: MakeAllocator, runtime: Path
) -> None:
    alloc = make_allocator(publish=True)
    (folder,) = runtime.iterdir()
    (own,) = folder.glob("*.stats.json")
    record = json.loads(own.read_text())
    other = folder / "7-7.stats.json"
    other.write_text(json.dumps({**record, "home": "another", "process": 7, "start": "1"}))
    assert [one.process for one in published()] == [os.getpid()]
    assert other.exists()
    alloc.close()


def test_a_program_that_ends_leaves_nothing(run_python: RunPython, runtime: Path) -> None:
    run_python(
        dedent("""
        from cumempool import CuMemAllocator, CuMemConfig

        allocator = CuMemAllocator(CuMemConfig(driver="host", publish=True))
        """)
    )
    (folder,) = runtime.iterdir()
    assert not list(folder.iterdir())


def test_a_fork_takes_nothing_away_of_what_its_parent_publishes(
    run_python: RunPython, runtime: Path
) -> None:
    done = run_python("""
import os, warnings
from cumempool._pool.publishing import Publisher, published
warnings.simplefilter("ignore")
publisher = Publisher(dict, lambda: {"tags": {}}, "parent", interval=3600)
child = os.fork()
if child == 0:
    publisher.close()  # which must not wait for a thread that is not there
    del publisher
    os._exit(0 if len(published()) == 1 else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert [one.process for one in published()] == [os.getpid()]
publisher.close()
assert published() == []
""")
    assert (done.code, done.err) == (0, "")
    assert not list(runtime.glob("*/*"))


def test_what_is_no_record_is_passed_over(make_allocator: MakeAllocator, runtime: Path) -> None:
    make_allocator(publish=True)
    (folder,) = runtime.iterdir()
    (folder / "1-x.stats.json").write_text("{")
    (folder / "2-x.stats.json").write_text("{}")
    assert [one.process for one in published()] == [os.getpid()]


def test_a_process_that_does_not_answer_is_named(make_allocator: MakeAllocator) -> None:
    publisher = Publisher(dict, lambda: {"tags": {}}, "stopped", interval=3600)
    (one,) = published()
    with refuses(CumempoolError, names=f"process {os.getpid()}"):
        request_snapshot(one, timeout=0.1)
    publisher.close()
    publisher.close()


# ---- top ---------------------------------------------------------------------------------------


def test_top_shows_each_tag_and_the_last_transition(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator(publish=True)
    tensors = [filled(alloc, GRANULE, tag) for tag in ("weights", "kv")]
    alloc.sleep(offload_tags="weights")
    with pytest.raises(UnknownTagError):
        alloc.wake_up("nobody")
    soon(lambda: (published()[0].stats["last_event"] or {}).get("error"))
    result = CliRunner().invoke(main, ["top", "--once"])
    assert result.exit_code == 0
    assert "weights" in result.output
    assert "2.00 MiB" in result.output
    assert "wake_up" in result.output
    assert "failed: UnknownTagError" in result.output
    del tensors


def test_top_says_how_to_publish_where_nobody_does() -> None:
    result = CliRunner().invoke(main, ["top", "--once"])
    assert "CUMEMPOOL_PUBLISH=1" in result.output.replace("\n", "")


def test_top_goes_on_until_it_is_interrupted(
    make_allocator: MakeAllocator, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_allocator(publish=True)
    looks = []

    def sleep(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(top.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        top.run_top(Console(force_terminal=True, file=io.StringIO()), interval=2, once=False)
    assert looks == [2, 2, 2]


# ---- Prometheus --------------------------------------------------------------------------------


def scrape(registry: CollectorRegistry) -> dict[str, float]:
    lines = generate_latest(registry).decode().splitlines()
    samples = (line.rpartition(" ") for line in lines if not line.startswith("#"))
    return {name: float(value) for name, _, value in samples}


def test_metrics_are_read_at_the_scrape(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator()
    registry = CollectorRegistry()
    registry.register(CuMemCollector(alloc, {"model": "m"}))
    assert scrape(registry)['cumempool_physical_bytes{model="m"}'] == 0
    tensor = filled(alloc, GRANULE, "data")
    alloc.sleep(tags="data")
    alloc.wake_up()
    alloc.sleep(tags="data")
    metrics = scrape(registry)
    assert metrics['cumempool_tag_bytes{model="m",state="backed_up",tag="data"}'] == GRANULE
    assert metrics['cumempool_tag_bytes{model="m",state="awake",tag="data"}'] == 0
    assert metrics['cumempool_tag_allocations{model="m",state="backed_up",tag="data"}'] == 1
    backup = 'cumempool_tag_backup_bytes{model="m",retained="no",tag="data",tier="pinned"}'
    assert metrics[backup] == GRANULE
    assert metrics['cumempool_sleeps_total{model="m"}'] == 2
    assert metrics['cumempool_wakes_total{model="m"}'] == 1
    seconds = metrics['cumempool_last_transition_seconds{model="m",operation="wake_up"}']
    assert 0 < seconds < 10
    copied = 'cumempool_last_transition_copied_bytes{model="m",operation="wake_up"}'
    assert metrics[copied] == GRANULE
    del tensor


def test_a_wake_in_the_background_has_a_time_and_no_copied_bytes(
    make_allocator: MakeAllocator,
) -> None:
    """Its event comes without a report."""
    alloc = make_allocator()
    registry = CollectorRegistry()
    registry.register(CuMemCollector(alloc))
    tensor = filled(alloc, GRANULE, "data")
    alloc.sleep(tags="data")
    alloc.wake_up(blocking=False).result()
    metrics = scrape(registry)
    assert metrics['cumempool_last_transition_seconds{operation="wake_up"}'] > 0
    assert metrics['cumempool_last_transition_copied_bytes{operation="sleep"}'] == GRANULE
    assert 'cumempool_last_transition_copied_bytes{operation="wake_up"}' not in metrics
    del tensor


def test_every_total_of_the_statistics_is_a_metric(make_allocator: MakeAllocator) -> None:
    alloc = make_allocator()
    registry = CollectorRegistry()
    registry.register(CuMemCollector(alloc))
    metrics = scrape(registry)
    for name, value in alloc.stats().to_dict().items():
        if isinstance(value, int):
            assert {f"cumempool_{name}", f"cumempool_{name}_total"} & metrics.keys(), name
