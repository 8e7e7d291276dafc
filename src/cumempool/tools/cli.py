"""Defines the ``cumempool`` command."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cumempool.errors import CumempoolError

if TYPE_CHECKING:
    from cumempool.config import DriverName
    from cumempool.tools.doctor import Check
    from cumempool.tools.selftest import Outcome

_Command = TypeVar("_Command", bound=Callable[..., Any])

_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead."
)


def _driver_option(text: str, *choices: str) -> Callable[[_Command], _Command]:
    """Returns the option for the driver; its default is the first choice, or cuda without any."""
    choices = choices or ("cuda", "host")
    return click.option(
        "--driver",
        type=click.Choice(choices),
        default=choices[0],
        envvar="CUMEMPOOL_DRIVER",
        show_default=True,
        show_envvar=True,
        help=text,
    )


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Ends the command on an error of the library, with its message and without a traceback."""
    try:
        yield
    except CumempoolError as error:
        raise click.ClickException(str(error)) from error


@click.group()
@click.version_option(package_name="cumempool")
def main() -> None:
    """GPU memory in tagged pools that PyTorch can put to sleep and wake at the same address."""


@main.command()
@_driver_option(
    "auto: cuda if a GPU can be used, else host with CPU tensors, and says so.",
    *("auto", "cuda", "host"),
)
@click.option(
    "--mib",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="MiB of weights; the KV cache takes as much.",
)
def demo(driver: str, mib: int) -> None:
    """Puts a model and its KV cache to sleep, wakes them, and checks that nothing changed."""
    from cumempool.tools.demo import run_demo

    with _errors_for_people():
        passed = run_demo(driver, mib * 1024**2)
    if not passed:
        raise click.exceptions.Exit(1)


@main.command()
@_driver_option("host: memory of the CPU, which works everywhere and is for tests.")
@_json_option
def doctor(driver: DriverName, as_json: bool) -> None:
    """Checks this machine. Each check is PASS, WARN or FAIL, with a reason and a fix.

    Exits with 1 if a check failed.
    """
    from cumempool.tools import doctor as doctors

    checks = doctors.examine(driver)
    good = doctors.passed(checks)
    if as_json:
        record = {"passed": good, "checks": [check.to_dict() for check in checks]}
        click.echo(json.dumps(record, indent=2))
    else:
        _print_checks(checks)
    if not good:
        raise click.exceptions.Exit(1)


@main.command()
@_driver_option("host: memory of the CPU, which works everywhere and is for tests.")
@click.option("-k", "matching", default="", metavar="TEXT", help="Only checks with this in them.")
@_json_option
def selftest(driver: DriverName, matching: str, as_json: bool) -> None:
    """Tries each promise of the pools on this machine's driver.

    Exits with 1 if one does not hold, or if no check was run.
    """
    from cumempool.config import CuMemConfig
    from cumempool.tools.selftest import run_selftest

    console = Console(quiet=as_json)
    config = CuMemConfig(driver=driver)
    outcomes = []
    with _errors_for_people():
        for outcome in run_selftest(config, matching=matching):
            outcomes.append(outcome)
            console.print(_line(outcome), soft_wrap=True)
    counts = _print_counts(console, outcomes)
    good = bool(counts["PASS"]) and not counts["FAIL"]
    if as_json:
        record = {"passed": good, "checks": [outcome.to_dict() for outcome in outcomes]}
        click.echo(json.dumps(record, indent=2))
    if not good:
        raise click.exceptions.Exit(1)


def _line(outcome: Outcome) -> Text:
    text = Text.assemble(
        (outcome.status, _STYLES[outcome.status]),
        f"  {outcome.rule:<3}  {outcome.name} ({outcome.seconds:.2f} s)",
    )
    if outcome.reason:
        text.append(f"\n      {outcome.reason}")
    return text


@main.command()
@click.option("--interval", type=click.FloatRange(min=0.1), default=2.0, show_default=True)
@click.option("--once", is_flag=True, help="Print it once; the default if output is no terminal.")
def top(interval: float, once: bool) -> None:
    """Shows the pools of this user's processes that publish their statistics.

    A process publishes with CuMemConfig(publish=True) or CUMEMPOOL_PUBLISH=1.
    """
    from cumempool.tools.top import run_top

    with _errors_for_people():
        run_top(Console(), interval=interval, once=once)


@main.command()
@click.argument("file", type=click.Path(dir_okay=False, writable=True))
@click.option("--process", type=int, help="Its number; needed if several processes publish.")
def snapshot(file: str, process: int | None) -> None:
    """Writes the allocations and latest events of a running process to FILE, as JSON.

    The process has to publish: CuMemConfig(publish=True) or CUMEMPOOL_PUBLISH=1. From inside a
    program, CuMemAllocator.save_snapshot() does the same.
    """
    from cumempool._pool.publishing import published, request_snapshot

    with _errors_for_people():
        found = [one for one in published() if process in (None, one.process)]
        if len(found) != 1:
            listed = ", ".join(f"{one.process} ({one.name})" for one in found) or "none"
            raise click.ClickException(f"one publishing process is needed; there are: {listed}")
        record = request_snapshot(found[0])
    Path(file).write_text(json.dumps(record), encoding="utf-8")
    click.echo(f"{len(record['allocations'])} allocations of process {found[0].process}: {file}")


@main.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False))
@click.option(
    "-o", "--output", type=click.Path(dir_okay=False), help="HTML; FILE.html if not given."
)
@click.option(
    "--torch",
    "pickled",
    type=click.Path(dir_okay=False),
    metavar="PICKLE",
    help="Write it for torch's memory visualizer as well.",
)
@click.option(
    "--link",
    type=click.FloatRange(min=0, min_open=True),
    metavar="GB/S",
    help="GB/s of the link; else rates are compared with the fastest one.",
)
def report(file: str, output: str | None, pickled: str | None, link: float | None) -> None:
    """Renders a snapshot or trace to one HTML page, which needs no network.

    Needs matplotlib: pip install cumempool[report].
    """
    from cumempool.tools import page

    try:
        with _errors_for_people():
            record = page.load(Path(file))
            target = Path(output or f"{file}.html")
            target.write_text(page.to_html(record, link_gb_per_s=link), encoding="utf-8")
            written = [target]
            if pickled:
                Path(pickled).write_bytes(page.to_torch(record))
                written.append(Path(pickled))
    except ImportError as error:
        raise click.ClickException(f"{error}: pip install cumempool[report]") from error
    for path in written:
        click.echo(path)


@main.command()
@_driver_option("host: memory of the CPU; says nothing about a GPU.")
@click.option(
    "--gib",
    type=click.FloatRange(min=0.001),
    default=4.0,
    show_default=True,
    help="GiB of device memory, and of pinned host memory.",
)
@click.option("--rounds", type=click.IntRange(min=1), default=5, show_default=True)
@_json_option
def bench(driver: DriverName, gib: float, rounds: int, as_json: bool) -> None:
    """Measures sleep and wake on this machine, beside plain copies of the same bytes."""
    from cumempool.config import CuMemConfig
    from cumempool.tools.bench import run_bench

    config = CuMemConfig(
        driver=driver,
        host_driver_bytes=int((gib + 1) * 1024**3),
    )
    with _errors_for_people():
        measurements = run_bench(config, int(gib * 1024**3), rounds)
    if as_json:
        click.echo(json.dumps([one.to_dict() for one in measurements], indent=2))
        return
    table = Table("what", "ms", "GB/s", "of the plain copy", box=None, pad_edge=False)
    for one in measurements:
        share = "" if one.link is None else f"{one.link:.2f}x"
        table.add_row(one.name, f"{one.seconds * 1e3:.1f}", f"{one.gb_per_s:.1f}", share)
    Console().print(table)


_STYLES = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red", "SKIP": "dim"}


def _print_checks(checks: list[Check]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    for check in checks:
        found = Text(check.value)
        if check.reason:
            found.append(f"\n{check.reason}")
        if check.fix:
            found.append(f"\nfix: {check.fix}", style="bold")
        table.add_row(Text(check.status, style=_STYLES[check.status]), Text(check.name), found)
    console = Console()
    console.print(table)
    _print_counts(console, checks)


def _print_counts(console: Console, checks: Sequence[Check | Outcome]) -> dict[str, int]:
    """Prints and returns the number of checks of each status."""
    counts = {status: sum(check.status == status for check in checks) for status in _STYLES}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items() if count))
    return counts
