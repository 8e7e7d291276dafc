"""The only package that knows how torch works inside. Everything else uses public torch."""

from cumempool._torch.read_only import ReadOnlyTensor
from cumempool._torch.routing import (
    LIBRARY,
    PoolRoute,
    PrivatePool,
    warm_capture_stream,
)
from cumempool._torch.runtime import (
    CurrentStream,
    build_kind,
    cached_bytes,
    current_streams,
    devices_in_use,
    empty_cache,
    has_native_allocator,
    is_capturing,
    is_initialized,
    memory_limit,
    nvtx_range,
    store_of_group,
)
from cumempool._torch.settings import (
    ExpandableSegmentsOff,
    expandable_segments_bypass_pools,
    live_settings,
    replace_setting,
)
from cumempool._torch.snapshots import PoolId, dead_ranges
from cumempool._torch.tensors import (
    as_plain,
    can_be_pointed,
    dispatches,
    from_capsule,
    ordinary_tensors,
    point,
    tensor_over,
    with_lazy_bits,
)
from cumempool._torch.unused import return_unused, settled_dead_ranges

__all__ = [
    "LIBRARY",
    "CurrentStream",
    "ExpandableSegmentsOff",
    "PoolId",
    "PoolRoute",
    "PrivatePool",
    "ReadOnlyTensor",
    "as_plain",
    "build_kind",
    "cached_bytes",
    "can_be_pointed",
    "current_streams",
    "dead_ranges",
    "devices_in_use",
    "dispatches",
    "empty_cache",
    "expandable_segments_bypass_pools",
    "from_capsule",
    "has_native_allocator",
    "is_capturing",
    "is_initialized",
    "live_settings",
    "memory_limit",
    "nvtx_range",
    "ordinary_tensors",
    "point",
    "replace_setting",
    "return_unused",
    "settled_dead_ranges",
    "store_of_group",
    "tensor_over",
    "warm_capture_stream",
    "with_lazy_bits",
]
