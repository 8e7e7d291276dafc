"""Bad input on the GPU: a clear typed error, nothing lost, the process alive."""

from __future__ import annotations

import pytest
import torch
from refusals import refuses

import cumempool


def test_bad_input_raises_typed_errors_and_loses_nothing(
    allocator: cumempool.CuMemAllocator, gpu: torch.device
) -> None:
    with allocator.use_memory_pool("weights"):
        tensor = torch.arange(1 << 20, device=gpu)
    expected = tensor.clone()
    with refuses(
        cumempool.UnknownTagError, names="'weights'", operation="sleep", tag="no such tag"
    ):
        allocator.sleep(offload_tags="no such tag")
    with pytest.raises(cumempool.UnknownTagError):
        allocator.wake_up("no such tag")
    with pytest.raises(cumempool.InvalidTypeError):
        allocator.sleep(offload_tags=3)  # type: ignore[arg-type]
    with pytest.raises(cumempool.InvalidArgumentError):
        allocator.use_memory_pool("")
    with pytest.raises(cumempool.InvalidArgumentError):
        allocator.use_memory_pool("zero\0byte")
    with pytest.raises(cumempool.InvalidArgumentError):
        allocator.use_memory_pool("weights", devices=[99])
    with pytest.raises(cumempool.InvalidArgumentError):
        allocator.empty(3, device="cpu")
    with pytest.raises(cumempool.InvalidArgumentError):
        allocator.empty(-1)
    with pytest.raises(cumempool.InvalidArgumentError):
        allocator.empty(2**63)
    with refuses(cumempool.InvalidArgumentError, names="host_backup_limit=0"):
        cumempool.CuMemConfig(host_backup_limit=0)
    with (
        allocator.use_memory_pool("weights"),
        refuses(cumempool.InUseError, names="scope", operation="sleep", tag="weights"),
    ):
        allocator.sleep()
    assert allocator.stats().asleep_bytes == 0
    assert torch.equal(tensor, expected)


def test_host_backup_limit_is_an_error_that_loses_nothing(gpu: torch.device) -> None:
    limited = cumempool.CuMemAllocator(
        cumempool.CuMemConfig(driver="cuda", host_backup_limit=32 << 20)
    )
    with limited.use_memory_pool("weights"):
        tensor = torch.arange(16 << 20, device=gpu)
    with refuses(
        cumempool.OutOfHostMemoryError, names="host_backup_limit", operation="sleep", tag="weights"
    ):
        limited.sleep(offload_tags="weights")
    assert limited.stats().asleep_bytes == 0
    assert int(tensor[-1]) == (16 << 20) - 1
    limited.discard("weights")
    limited.wake_up()
    del tensor
    limited.close()
