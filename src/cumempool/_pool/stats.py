"""Defines the statistics of an allocator: bytes per tag and state, totals, allocations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cumempool._pool.report import format_bytes

if TYPE_CHECKING:
    from cumempool import _core

#: Bits of a handle type set and the names of the types, as in ``cumempool/driver.h``.
HANDLE_TYPES: Mapping[int, str] = MappingProxyType({1: "posix_fd", 8: "fabric"})


def handle_type_names(bits: int) -> tuple[str, ...]:
    """Returns the names of the handle types in a bit set, such as ``("posix_fd",)``."""
    return tuple(name for bit, name in HANDLE_TYPES.items() if bits & bit)


@dataclass(frozen=True, slots=True)
class AllocationInfo:
    """One live allocation.

    Attributes:
        address: Start of its address range; the same for life.
        bytes: Size, a multiple of the granularity.
        requested_bytes: Requested size.
        tag: Its tag.
        device: Device ordinal.
        state: ``"awake"``, ``"backed_up"`` or ``"discarded"``; the last two are asleep.
        generation: Grows at each wake: physical pages changed, registrations are stale.
        backup_bytes: Bytes of its backup; while it is awake, of the backup retained from its last
            sleep.
        backup_tier: Tier of that backup: ``"pinned"``, ``"pageable"``, ``"file"``, ``"peer"``; None
            if there is none.
        backing: Kind of its memory: ``"vmm"``, or ``"cuda_malloc"``, which cannot sleep.
        sequence: Order of allocation.
        preserved: Whether its contents are kept if its tag is discarded.
    """

    address: int
    bytes: int
    requested_bytes: int
    tag: str
    device: int
    state: str
    generation: int
    backup_bytes: int
    backup_tier: str | None
    backing: str
    sequence: int
    preserved: bool

    def to_dict(self) -> dict[str, object]:
        """Returns all fields, as types that ``json.dumps`` accepts."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class TagStats:
    """One tag, all devices together. All numbers are bytes or counts of allocations.

    Attributes:
        tag: The tag.
        on_sleep: Its own policy: ``"offload"``, ``"discard"`` or None.
        on_wake: Its own policy: ``"undefined"``, ``"zero"`` or None.
        handle_types: Handle types for exporting its memory, frozen at the first allocation.
        rdma: Whether its memory was made for GPUDirect RDMA.
        awake_allocations: Allocations that are mapped.
        awake_bytes: Their bytes.
        backed_up_allocations: Allocations asleep with a backup.
        backed_up_bytes: Their bytes.
        discarded_allocations: Allocations asleep without one.
        discarded_bytes: Their bytes.
        backup_bytes: Bytes of the backups of sleeping memory.
        retained_bytes: Bytes of the backups retained for awake memory.
        backup_tier: Tier of backups from the next sleep on: ``"pinned"``, ``"pageable"``,
            ``"file"`` or ``"peer"``.
        backing: Kind of its memory: ``"vmm"``, or ``"cuda_malloc"``, which cannot sleep.
        pins: Number of pins that keep it awake; see `CuMemAllocator.pin`.
        unreleased_bytes: Bytes asleep with contents still in device memory, because a failed sleep
            could not map them again.
        preserved_bytes: Bytes, awake or asleep, whose contents are kept if the tag is discarded.
    """

    tag: str
    on_sleep: str | None
    on_wake: str | None
    handle_types: tuple[str, ...]
    rdma: bool
    awake_allocations: int
    awake_bytes: int
    backed_up_allocations: int
    backed_up_bytes: int
    discarded_allocations: int
    discarded_bytes: int
    backup_bytes: int
    retained_bytes: int
    backup_tier: str
    backing: str
    pins: int
    unreleased_bytes: int
    preserved_bytes: int

    @property
    def asleep_bytes(self) -> int:
        """Bytes asleep, backed up or discarded."""
        return self.backed_up_bytes + self.discarded_bytes

    def __str__(self) -> str:
        amounts = {
            "awake": self.awake_bytes,
            "backed up": self.backed_up_bytes,
            "discarded": self.discarded_bytes,
        }
        parts = [f"{format_bytes(count)} {what}" for what, count in amounts.items() if count]
        parts += [f"{self.pins} pins"] if self.pins else []
        return f"{self.tag}: {', '.join(parts) or 'nothing'}"


_COUNTS = tuple(f.name for f in fields(TagStats) if f.name.endswith(("_allocations", "_bytes")))
_OF_THE_TAG = ("tag", "on_sleep", "on_wake", "backup_tier", "backing", "pins")


def _tag_stats(rows: Sequence[Mapping[str, Any]]) -> TagStats:
    first = rows[0]
    used = [row for row in rows if row["device"] >= 0]
    common = used[0]["handle_types"] if used else 0
    for row in used:
        common &= row["handle_types"]
    return TagStats(
        handle_types=handle_type_names(common),
        rdma=bool(used) and all(row["rdma"] for row in used),
        **{name: first[name] for name in _OF_THE_TAG},
        **{name: sum(row[name] for row in rows) for name in _COUNTS},
    )


@dataclass(frozen=True, slots=True)
class Stats:
    """The state of an allocator at one moment. All ``_bytes`` are bytes.

    Attributes:
        tags: Statistics per tag; read-only.
        reserved_address_bytes: Address space held from the driver.
        physical_bytes: Device memory held from the driver: created minus released.
        mapped_bytes: The part of it that is mapped.
        pending_free_bytes: Freed by the program but not yet released, because a device is busy or a
            transition runs.
        host_bytes: Pinned host memory held for backups.
        host_used_bytes: The part of it that holds backups, including those retained.
        pageable_bytes: Pageable host memory held for backups.
        file_bytes: Size of the backup files.
        peer_bytes: Device memory held for backups of other devices.
        staging_bytes: Pinned host memory held for buffers and digests.
        malloc_calls: Allocations tried.
        malloc_failures: Allocations that failed.
        free_calls: Frees.
        sleeps: Sleeps and discards that succeeded.
        wakes: Wakes that succeeded.
        swaps: Swaps that succeeded.
        failed_transitions: Transitions that failed and changed nothing.
        peak_physical_bytes: Maximum of ``physical_bytes``, ever or since
            `CuMemAllocator.reset_peak_stats`.
        leaked_bytes: Memory that the driver refuses to take back. `close` tries once more.
        last_malloc_failure: Cause of the last failed allocation, or ``""``.
    """

    tags: Mapping[str, TagStats]
    reserved_address_bytes: int
    physical_bytes: int
    mapped_bytes: int
    pending_free_bytes: int
    host_bytes: int
    host_used_bytes: int
    pageable_bytes: int
    file_bytes: int
    peer_bytes: int
    staging_bytes: int
    malloc_calls: int
    malloc_failures: int
    free_calls: int
    sleeps: int
    wakes: int
    swaps: int
    failed_transitions: int
    peak_physical_bytes: int
    leaked_bytes: int
    last_malloc_failure: str

    @classmethod
    def from_snapshot(cls, snapshot: Mapping[str, Any]) -> Stats:
        """Makes statistics from the extension module's ``snapshot()``."""
        rows: dict[str, list[Mapping[str, Any]]] = {}
        for row in snapshot["tags"]:
            rows.setdefault(row["tag"], []).append(row)
        tags = {tag: _tag_stats(of_tag) for tag, of_tag in rows.items()}
        return cls(
            tags=MappingProxyType(tags),
            last_malloc_failure=snapshot["last_malloc_failure"],
            **snapshot["totals"],
        )

    @property
    def awake_bytes(self) -> int:
        """Bytes awake over all tags."""
        return sum(tag.awake_bytes for tag in self.tags.values())

    @property
    def asleep_bytes(self) -> int:
        """Bytes asleep over all tags."""
        return sum(tag.asleep_bytes for tag in self.tags.values())

    def __str__(self) -> str:
        held = (
            f"{format_bytes(self.awake_bytes)} awake, {format_bytes(self.asleep_bytes)} asleep; "
            f"backups: {format_bytes(self.host_used_bytes)} pinned"
        )
        others = {
            "pageable": self.pageable_bytes,
            "in files": self.file_bytes,
            "on other devices": self.peer_bytes,
        }
        held += "".join(f", {format_bytes(n)} {where}" for where, n in others.items() if n)
        failed = f"last failed allocation: {self.last_malloc_failure}"
        lines = [held, *(f"  {tag}" for tag in self.tags.values())]
        return "\n".join([*lines, failed] if self.last_malloc_failure else lines)

    def to_dict(self) -> dict[str, object]:
        """Returns all fields, as types that ``json.dumps`` accepts."""
        plain: dict[str, object] = {
            field.name: getattr(self, field.name) for field in fields(self) if field.name != "tags"
        }
        plain["tags"] = {name: asdict(tag) for name, tag in self.tags.items()}
        return plain


def stats_of(core: _core.Allocator) -> Stats:
    """Returns the statistics of an allocator."""
    return Stats.from_snapshot(core.snapshot(False))


def allocations_of(core: _core.Allocator) -> list[AllocationInfo]:
    """Returns every live allocation of an allocator, in order of allocation."""
    return [AllocationInfo(**info) for info in core.snapshot(True)["allocations"]]
