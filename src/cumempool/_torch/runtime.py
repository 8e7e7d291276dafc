"""Queries torch's build and its state: devices, streams, caches, captures."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, Final

import torch

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_C: Final[Any] = torch._C

CurrentStream = tuple[int, int]
"""A device ordinal, and its current ``cudaStream_t`` as an integer."""


def torch_version() -> tuple[int, int]:
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def build_kind() -> str:
    """Returns the build of this torch: ``"cuda"``, ``"rocm"`` or ``"cpu"``."""
    if torch.version.hip is not None:
        return "rocm"
    return "cuda" if torch.version.cuda is not None else "cpu"


def is_initialized() -> bool:
    """Whether torch has started to use CUDA in this process; asking does not start it."""
    return build_kind() == "cuda" and torch.cuda.is_initialized()


def devices_in_use() -> list[int]:
    """Returns the current device and every other with a primary context, ascending."""
    torch.cuda.init()
    current = torch.cuda.current_device()
    others = [
        device
        for device in range(torch.cuda.device_count())
        if device == current or _C._cuda_hasPrimaryContext(device)
    ]
    return sorted({current, *others})


def current_streams() -> list[CurrentStream]:
    """Returns the calling thread's current stream of each device in use."""
    if not is_initialized():
        return []
    return [
        (device, int(torch.cuda.current_stream(device).cuda_stream)) for device in devices_in_use()
    ]


def is_capturing() -> bool:
    """Whether the calling thread's current stream is being captured into a graph."""
    return is_initialized() and torch.cuda.is_current_stream_capturing()


def empty_cache() -> None:
    """Frees torch's unused segments, including those of pools that are gone."""
    if is_initialized():
        torch.cuda.empty_cache()


def nvtx_range(name: str) -> contextlib.AbstractContextManager[object]:
    """Returns an NVTX range with a name, or a null context if this torch cannot make one."""
    if build_kind() != "cuda":
        return contextlib.nullcontext()
    mark: contextlib.AbstractContextManager[object] = torch.cuda.nvtx.range(name)
    return mark


def has_native_allocator() -> bool:
    """Whether torch's own caching allocator serves CUDA, not a pluggable one or cudaMallocAsync.

    Only that allocator has pools, and can be queried.
    """
    return str(torch.cuda.get_allocator_backend()) == "native"


def cached_bytes() -> int:
    """Returns the bytes on all devices that torch holds and no tensor uses."""
    if not is_initialized() or not has_native_allocator():
        return 0
    return sum(
        torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        for device in devices_in_use()
    )


def memory_limit(device: int) -> float:
    """Returns torch's limit on a device as a fraction of its memory; 1.0 for no limit."""
    ask = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # not in every torch
    return 1.0 if ask is None else float(ask(device))


def store_of_group(group: ProcessGroup | None) -> Any:
    """Returns the store of a process group's ranks; None means the default group."""
    from torch.distributed import distributed_c10d

    chosen: Any = distributed_c10d.GroupMember.WORLD if group is None else group
    if hasattr(chosen, "get_group_store"):  # not in every torch since 2.6
        return chosen.get_group_store()
    return distributed_c10d._world.pg_map[chosen][1]
