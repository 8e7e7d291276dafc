"""The ``cumempool`` command."""

from __future__ import annotations

import click

from cumempool.errors import CumempoolError

__all__ = ["main"]


@click.group()
@click.version_option(package_name="cumempool")
def main() -> None:
    """GPU memory in tagged pools that PyTorch can put to sleep and wake at the same address."""


@main.command()
@click.option(
    "--driver",
    type=click.Choice(["auto", "cuda", "host"]),
    default="auto",
    show_default=True,
    help="auto: cuda where a GPU can be used, else host with CPU tensors, and says so.",
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
    from cumempool.demo import run_demo

    try:
        passed = run_demo(driver, mib * 1024**2)
    except CumempoolError as error:
        raise click.ClickException(str(error)) from error
    if not passed:
        raise click.exceptions.Exit(1)
