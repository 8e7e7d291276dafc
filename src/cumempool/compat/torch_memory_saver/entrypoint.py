"""Defines `TorchMemorySaver`, which pauses and resumes regions as tags of a `CuMemAllocator`."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from cumempool._locks import fork_safe_lock
from cumempool._pool.backup import Backup
from cumempool._pool.checks import check_bool, check_int
from cumempool.allocator import CuMemAllocator
from cumempool.compat.torch_memory_saver.cpu_backups import CpuBackups
from cumempool.compat.torch_memory_saver.graph_captures import GraphCaptures
from cumempool.compat.torch_memory_saver.open_regions import OpenRegions
from cumempool.config import CuMemConfig
from cumempool.errors import InvalidArgumentError, InvalidTypeError, UnsupportedError

if TYPE_CHECKING:
    import torch

CpuBackupBackend = Literal["mmap", "pinned"]
HookMode = Literal["preload", "torch"]

_TAG_DEFAULT: Final = "default"
#: Ends the names of tags whose contents go to files.
_DISK: Final = ":disk"
_PRELOAD_VARIABLES: Final = ("TMS_INIT_ENABLE", "TMS_INIT_ENABLE_DISK_BACKUP")

_logger = logging.getLogger("cumempool")


class TorchMemorySaver:
    """Pauses memory allocated in its regions, and resumes it at the same addresses. Thread-safe.

    A tag may have memory with and without a backup. Each kind is a separate tag in the allocator,
    such as ``"weights:pinned"`` and ``"weights:discarded"``; a pause or a resume takes all kinds of
    a tag in one transaction.

    Args:
        allocator: The allocator. None: its own, made at the first use with the configuration of the
            ``CUMEMPOOL_*`` variables.
    """

    def __init__(self, *, allocator: CuMemAllocator | None = None) -> None:
        self._allocator = allocator
        self._lock: Final = fork_safe_lock()
        self._names: dict[str, set[str]] = {}
        self._regions: Final = OpenRegions()
        self._graphs: Final = GraphCaptures()
        self._backups: Final = CpuBackups()
        self._hook_mode: HookMode = "torch"
        self._margin_bytes = 0
        self._retain = _flag("TMS_RETAIN_CPU_BACKUP")
        self._disk_directory = os.environ.get("TMS_DISK_BACKUP_DIR") or None

    @property
    def allocator(self) -> CuMemAllocator:
        """The allocator below; the first use makes it.

        Raises:
            UnavailableError: There is no driver here, with the reason.
            InvalidArgumentError: A ``CUMEMPOOL_*`` variable has a value that it does not take.
        """
        allocator = self._allocator
        if allocator is not None:
            return allocator
        _warn_of_preload_variables()
        made = CuMemAllocator(CuMemConfig.from_env())
        with self._lock:
            if self._allocator is None:
                made.set_memory_margin(self._margin_bytes)
                self._allocator = made
            allocator = self._allocator
        if allocator is not made:  # another thread was faster
            made.close()
        return allocator

    # ---- allocating ----------------------------------------------------------------------------

    @contextlib.contextmanager
    def region(
        self,
        tag: str = _TAG_DEFAULT,
        enable_cpu_backup: bool = False,
        enable_disk_backup: bool = False,
        cpu_backup_backend: CpuBackupBackend | None = None,
        *,
        all_threads: bool = False,
    ) -> Iterator[None]:
        """Makes all allocations of the calling thread in the body pausable.

        Regions nest; the innermost one counts.

        Args:
            tag: The tag for `pause` and `resume`.
            enable_cpu_backup: Keep the contents in host memory during a pause; else they are
                undefined after a resume.
            enable_disk_backup: Keep them in a file instead; see `set_disk_backup_dir`.
            cpu_backup_backend: ``"pinned"``, or ``"mmap"`` for pageable host memory. None: the
                value of ``TMS_INIT_CPU_BACKUP_BACKEND``, else ``"pinned"``.
            all_threads: Include allocations of other threads, gradients among them.

        Raises:
            InvalidArgumentError: Both kinds of backup, a backend that does not exist or without
                `enable_cpu_backup`, or no directory for files.
            UnavailableError: There is no driver here.
            InUseError: With `all_threads`: another thread has a region open.
            OutOfSlotsError: Too many regions are open at the same time.
        """
        backup = self._backup(enable_cpu_backup, enable_disk_backup, cpu_backup_backend)
        name = f"{tag}:{_kind(backup)}"
        self._declare(tag, name, backup)
        make_scope = partial(self.allocator.use_memory_pool, name, all_threads=all_threads)
        with self._regions.opened(name, make_scope):
            yield

    @contextlib.contextmanager
    def cuda_graph(
        self,
        cuda_graph: torch.cuda.CUDAGraph,
        pool: tuple[int, int] | None = None,
        stream: torch.cuda.Stream | None = None,
        capture_error_mode: str = "global",
        tag: str = _TAG_DEFAULT,
        enable_cpu_backup: bool = False,
        cpu_backup_backend: CpuBackupBackend | None = None,
    ) -> Iterator[None]:
        """Captures the body into a graph, as ``torch.cuda.graph`` does, with pausable memory.

        Args:
            cuda_graph: The graph to capture into.
            pool: A name that graphs which share memory have in common: ``other.pool()``, or the
                result of ``torch.cuda.graph_pool_handle()``. Memory always comes from a pool of the
                tag. None: a pool for this graph alone.
            stream: The stream to capture; None: torch's own.
            capture_error_mode: As for ``torch.cuda.graph``.
            tag: The tag for `pause` and `resume`.
            enable_cpu_backup: As for `region`; replays need it only if the graph reads contents
                that the capture or an earlier replay has left in its memory.
            cpu_backup_backend: As for `region`.

        Raises:
            InUseError: Memory of the same pool and tag is paused.
            OutOfSlotsError: Too many graphs with pools of their own; let them share a `pool`.
            UnsupportedError: The allocator is on the ``host`` driver.
            InvalidArgumentError: As for `region`.
        """
        import torch

        if self.allocator.config.driver != "cuda":
            raise UnsupportedError(
                "cuda_graph: the host driver has no graphs",
                operation="cuda_graph",
                tag=tag,
                advice="use the cuda driver",
            )
        backup = self._backup(enable_cpu_backup, False, cpu_backup_backend)
        device = torch.cuda.current_device() if stream is None else int(stream.device.index)

        def declare(name: str) -> None:
            self._declare(tag, name, backup)

        prefix = f"{tag}:{_kind(backup)}"
        with contextlib.ExitStack() as stack:
            handle: Any = stack.enter_context(
                self._graphs.pool(self.allocator, declare, prefix, device, pool, cuda_graph)
            )
            stack.enter_context(
                torch.cuda.graph(
                    cuda_graph, pool=handle, stream=stream, capture_error_mode=capture_error_mode
                )
            )
            yield

    @contextlib.contextmanager
    def disable(self) -> Iterator[None]:
        """Allocates ordinary torch memory in the body, which no pause touches.

        It leaves the thread's regions and enters them again. At the end, unused memory that torch
        has reserved meanwhile goes back to the device.

        Raises:
            UnsupportedError: In the body of `cuda_graph`, whose memory must be in one pool.
        """
        if self._graphs.capturing():
            raise UnsupportedError(
                "disable: the memory of a graph comes from one pool, which can be paused",
                operation="disable",
                advice="allocate before the capture, or capture with torch.cuda.graph",
            )
        with self._regions.left():
            reserved = _reserved_bytes()
            try:
                yield
            finally:
                if _reserved_bytes() > reserved:
                    _empty_cache()

    # ---- pausing -------------------------------------------------------------------------------

    def pause(self, tag: str | None = None) -> None:
        """Gives the memory of a tag back to the device; addresses stay.

        All or nothing. Work in flight finishes first. Paused memory stays paused; a tag without
        memory is no error. The calling thread's own regions may be open.

        Args:
            tag: None: all tags.

        Raises:
            InUseError: Another thread has a region of the tag open.
            StreamCaptureError: The calling thread's current stream is being captured.
            OutOfHostMemoryError: No host memory for the backup.
            BackupError: A backup file cannot be made or written.
            TransitionInProgressError: Called from inside a transition.
            DriverError: A driver call failed.
        """
        names = self._names_of(tag)
        if not names:
            _logger.debug("pause(%r): nothing was allocated under it", tag)
            return
        self._backups.forget(names)
        self._graphs.reap(self.allocator)
        with contextlib.ExitStack() as stack:
            if self._regions.names().intersection(names):
                stack.enter_context(self._regions.left())
            self.allocator.sleep(tags=names)

    def resume(self, tag: str | None = None) -> None:
        """Brings the memory of a tag back at the same addresses, with its backed-up contents.

        All or nothing: if it fails, all is still paused, and it can be called again. Memory that is
        not paused stays as it is. Unless `retain_cpu_backup` is set, host memory without backups of
        paused memory goes back to the system.

        Args:
            tag: None: all tags.

        Raises:
            OutOfMemoryError: The device has no room (also a ``RuntimeError``).
            StreamCaptureError: The calling thread's current stream is being captured.
            BackupError: A backup file could not be read.
            TransitionInProgressError: Called from inside a transition.
            DriverError: A driver call failed.
        """
        names = self._names_of(tag)
        if not names:
            _logger.debug("resume(%r): nothing was allocated under it", tag)
            return
        self._graphs.reap(self.allocator)
        self.allocator.wake_up(names)
        if not self._retain:
            self._backups.forget(names)
            self.allocator.release_host_memory()

    def get_cpu_backup(self, x: torch.Tensor, zero_copy: bool = False) -> torch.Tensor | None:
        """Returns the backup of a paused tensor, on the CPU.

        Args:
            x: A tensor or view of memory that was allocated in a region.
            zero_copy: Return a read-only view of the backup, which keeps its host memory while it
                lives.

        Returns:
            A tensor of the same shape, dtype and strides (a copy is as ``clone`` makes it). None if
            this process's memory has no backup of it: it is not of a region, its region keeps none,
            or it is not paused. If `retain_cpu_backup` is on, a backup that was asked for during
            the last pause is still returned after the resume.

        Raises:
            InvalidTypeError: It is no tensor, or a quantized one.
            InvalidArgumentError: Not all of its bytes are in the backup.
        """
        view = self._backups.view(self.allocator, x, self._retain)
        return view if view is None or zero_copy else view.clone()

    # ---- settings ------------------------------------------------------------------------------

    @property
    def enabled(self) -> bool:
        """True: regions take effect. Without a driver they raise `UnavailableError`."""
        return True

    @property
    def hook_mode(self) -> HookMode:
        """``"torch"`` or ``"preload"``; both route torch's allocations, without ``LD_PRELOAD``.

        With ``"preload"``, torch_memory_saver also takes memory that libraries allocate by
        ``cudaMalloc`` beside torch. cumempool does not; a warning says so.
        """
        return self._hook_mode

    @hook_mode.setter
    def hook_mode(self, hook_mode: HookMode) -> None:
        if hook_mode not in get_args(HookMode):
            raise InvalidArgumentError(f"hook_mode={hook_mode!r} is not 'torch' or 'preload'")
        if hook_mode == "preload" and self._hook_mode != "preload":
            _logger.warning(
                "hook_mode='preload': nothing is preloaded. Regions take torch's allocations, "
                "CUDA graphs included; memory that libraries allocate beside torch is not paused."
            )
        self._hook_mode = hook_mode

    @property
    def memory_margin_bytes(self) -> int:
        """Bytes of each device that regions leave free; 0 at the start.

        An allocation that would leave less raises torch's own out-of-memory error. A resume ignores
        it.
        """
        return self._margin_bytes

    @memory_margin_bytes.setter
    def memory_margin_bytes(self, value: int) -> None:
        if check_int(value, "memory_margin_bytes is an int") < 0:
            raise InvalidArgumentError(f"memory_margin_bytes={value} is negative")
        with self._lock:
            if self._allocator is not None:
                self._allocator.set_memory_margin(value)
            self._margin_bytes = value

    @property
    def retain_cpu_backup(self) -> bool:
        """Whether a resume keeps backups, so that the next pause copies only changed contents.

        It counts at each resume. ``TMS_RETAIN_CPU_BACKUP=1`` switches it on from the start. (It has
        no effect if the allocator was made with ``retain_backups=False``.)
        """
        return self._retain

    @retain_cpu_backup.setter
    def retain_cpu_backup(self, value: bool) -> None:
        check_bool(retain_cpu_backup=value)
        self._retain = value

    def set_disk_backup_dir(self, path: str) -> None:
        """Sets the directory of ``enable_disk_backup`` regions, from the next pause on.

        ``TMS_DISK_BACKUP_DIR`` sets it from the start.

        Args:
            path: A directory; made if it does not exist.

        Raises:
            OSError: It cannot be made.
        """
        directory = os.path.abspath(path)
        os.makedirs(directory, exist_ok=True)
        with self._lock:
            self._disk_directory = directory
            disk = [n for names in self._names.values() for n in names if n.endswith(_DISK)]
        for name in disk:
            self.allocator.set_backup(name, Backup.file(directory))

    # ---- inside --------------------------------------------------------------------------------

    def _names_of(self, tag: str | None) -> list[str]:
        """Returns the allocator's tags behind one of ours, or behind all."""
        if tag is not None and not isinstance(tag, str):
            raise InvalidTypeError(f"a tag is a str or None, not {tag!r}")
        with self._lock:
            if tag is not None:
                return sorted(self._names.get(tag, ()))
            return sorted(name for names in self._names.values() for name in names)

    def _declare(self, tag: str, name: str, backup: Backup | None) -> None:
        """Declares one of the allocator's tags, with its policy."""
        if not isinstance(tag, str):
            raise InvalidTypeError(f"a tag is a str, not {tag!r}")
        allocator = self.allocator
        with self._lock:
            if name not in self._names.get(tag, ()):
                allocator.use_memory_pool(
                    name, on_sleep="discard" if backup is None else "offload", backup=backup
                )
                self._names.setdefault(tag, set()).add(name)

    def _backup(self, cpu: bool, disk: bool, backend: str | None) -> Backup | None:
        if cpu and disk:
            raise InvalidArgumentError(
                "enable_cpu_backup and enable_disk_backup exclude each other; choose one"
            )
        if backend is not None and not cpu:
            raise InvalidArgumentError("cpu_backup_backend requires enable_cpu_backup=True")
        if disk:
            if self._disk_directory is None:
                raise InvalidArgumentError(
                    "enable_disk_backup: there is no directory for files; call "
                    "set_disk_backup_dir() or set TMS_DISK_BACKUP_DIR first"
                )
            os.makedirs(self._disk_directory, exist_ok=True)
            return Backup.file(self._disk_directory)
        if not cpu:
            return None
        chosen = backend or os.environ.get("TMS_INIT_CPU_BACKUP_BACKEND") or "pinned"
        if chosen not in get_args(CpuBackupBackend):
            raise InvalidArgumentError(f"cpu_backup_backend={chosen!r} is not 'pinned' or 'mmap'")
        return Backup.pinned() if chosen == "pinned" else Backup.pageable()


def _reserved_bytes() -> int:
    """Returns the bytes that torch has reserved on all devices, pools included."""
    import torch

    if not torch.cuda.is_initialized():
        return 0
    return sum(torch.cuda.memory_reserved(d) for d in range(torch.cuda.device_count()))


def _empty_cache() -> None:
    import torch

    try:
        torch.cuda.empty_cache()
    except RuntimeError:
        # torch before 2.9 refuses during any graph capture. Unused memory stays cached.
        _logger.debug("torch refused to empty its cache")


def _kind(backup: Backup | None) -> str:
    if backup is None:
        return "discarded"
    return "disk" if backup.tier == "file" else backup.tier


def _flag(variable: str) -> bool:
    return os.environ.get(variable, "").strip().lower() in {"1", "true", "yes", "on"}


def _warn_of_preload_variables() -> None:
    found = [variable for variable in _PRELOAD_VARIABLES if _flag(variable)]
    if found:
        _logger.warning(
            "%s has no effect, since nothing is preloaded: allocate inside region(), with "
            "all_threads=True if other threads allocate too",
            ", ".join(found),
        )
