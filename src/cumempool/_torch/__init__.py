"""Depends on torch's internals, as the only package. Everything else uses public torch."""

from cumempool._torch.read_only import ReadOnlyTensor as ReadOnlyTensor
from cumempool._torch.routing import LIBRARY as LIBRARY
from cumempool._torch.routing import PoolRoute as PoolRoute
from cumempool._torch.routing import PrivatePool as PrivatePool
from cumempool._torch.routing import warm_capture_stream as warm_capture_stream
from cumempool._torch.runtime import CurrentStream as CurrentStream
from cumempool._torch.runtime import build_kind as build_kind
from cumempool._torch.runtime import cached_bytes as cached_bytes
from cumempool._torch.runtime import current_streams as current_streams
from cumempool._torch.runtime import devices_in_use as devices_in_use
from cumempool._torch.runtime import empty_cache as empty_cache
from cumempool._torch.runtime import has_native_allocator as has_native_allocator
from cumempool._torch.runtime import is_capturing as is_capturing
from cumempool._torch.runtime import is_initialized as is_initialized
from cumempool._torch.runtime import memory_limit as memory_limit
from cumempool._torch.runtime import nvtx_range as nvtx_range
from cumempool._torch.runtime import store_of_group as store_of_group
from cumempool._torch.settings import ExpandableSegmentsOff as ExpandableSegmentsOff
from cumempool._torch.settings import (
    expandable_segments_bypass_pools as expandable_segments_bypass_pools,
)
from cumempool._torch.settings import live_settings as live_settings
from cumempool._torch.settings import replace_setting as replace_setting
from cumempool._torch.snapshots import PoolId as PoolId
from cumempool._torch.snapshots import dead_ranges as dead_ranges
from cumempool._torch.tensors import as_plain as as_plain
from cumempool._torch.tensors import can_be_pointed as can_be_pointed
from cumempool._torch.tensors import dispatches as dispatches
from cumempool._torch.tensors import from_capsule as from_capsule
from cumempool._torch.tensors import ordinary_tensors as ordinary_tensors
from cumempool._torch.tensors import point as point
from cumempool._torch.tensors import tensor_over as tensor_over
from cumempool._torch.tensors import with_lazy_bits as with_lazy_bits
from cumempool._torch.unused import return_unused as return_unused
from cumempool._torch.unused import settled_dead_ranges as settled_dead_ranges
