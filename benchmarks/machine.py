"""Describes the machine and the software for a record."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import host_memory
import torch
from bench import Settings


def describe(settings: Settings) -> dict[str, Any]:
    """Returns the description. Call it in a separate process: it makes contexts on the GPUs."""
    machine: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))),
        "host_memory_available_bytes": host_memory.available_bytes(),
        "devices": [],
    }
    if settings.driver == "cuda":
        machine |= {"kernel_driver": _kernel_driver(), "devices": _devices()}
    return {"machine": machine, "versions": _versions(settings)}


def commit() -> str:
    """Returns the measured commit: CUMEMPOOL_COMMIT, or else the checkout's."""
    if "CUMEMPOOL_COMMIT" in os.environ:
        return os.environ["CUMEMPOOL_COMMIT"]
    done = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "-q", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.strip() or "unknown"


def _devices() -> list[dict[str, Any]]:
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "bytes": properties.total_memory,
                "numa_node": _numa_node(properties),
            }
        )
    return found


def _numa_node(properties: Any) -> int | None:
    try:
        domain, bus, device = (
            getattr(properties, f"pci_{part}_id") for part in ("domain", "bus", "device")
        )
        path = Path(f"/sys/bus/pci/devices/{domain:04x}:{bus:02x}:{device:02x}.0/numa_node")
        return int(path.read_text())
    except (AttributeError, OSError, ValueError):
        return None  # an older torch, or a system that does not say


def _kernel_driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text()) if path.exists() else None
    return found[0] if found else "unknown"


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.machine()
    found = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else platform.machine()


def _versions(settings: Settings) -> dict[str, str]:
    versions = {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "none",
        "cumempool": _version("cumempool"),
    }
    if settings.peers is not None:
        versions["vllm"] = settings.vllm_version or _version("vllm")
        versions["torch_memory_saver"] = _version("torch_memory_saver")
    return versions


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
