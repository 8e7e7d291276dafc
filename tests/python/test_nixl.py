"""A tag stays registered with a NIXL agent through every sleep and wake: order, failures, leaks."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace, TracebackType
from typing import Any

import pytest
import torch
from conftest import Done, RunPython
from refusals import refuses

from cumempool import (
    ClosedError,
    CuMemAllocator,
    CuMemConfig,
    InUseError,
    InvalidArgumentError,
    InvalidTypeError,
    NotInPoolError,
    TransitionInProgressError,
    UnavailableError,
    UnknownTagError,
)
from cumempool.integrations.nixl import (
    RegisteredTag,
    create_agent,
    is_installed,
    replace_remote_agent,
)

MIB = 1 << 20
GUARD_METHODS = ("registrable_ranges", "register_hooks", "pin")
Hook = Callable[[str, "list[Range]"], None]


# ---- a model of the registration guard, step for step as the allocator has it


@dataclass(frozen=True)
class Range:
    address: int
    bytes: int
    device: int
    generation: int


class Pin:
    def __init__(self, guard: ModelGuard, tag: str, holder: str) -> None:
        self.guard, self.tag, self.holder = guard, tag, holder

    def release(self) -> None:
        if self in self.guard.pins:
            self.guard.pins.remove(self)

    def __enter__(self) -> Pin:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Hooks:
    def __init__(self, guard: ModelGuard, tag: str, before: Hook | None, after: Hook | None):
        self.guard, self.tag, self.before, self.after = guard, tag, before, after

    def remove(self) -> None:
        if self in self.guard.hooks:
            self.guard.hooks.remove(self)


class ModelGuard:
    """Hooks first, in order; then the pins are looked at; a refusal calls after_map again."""

    def __init__(self, driver: str = "host") -> None:
        self.config = SimpleNamespace(driver=driver)
        self.memory: dict[str, list[tuple[torch.Tensor, int]]] = {}
        self.generations: dict[str, int] = {}
        self.asleep: set[str] = set()
        self.pins: list[Pin] = []
        self.hooks: list[Hooks] = []

    def empty(self, size: int, *, dtype: torch.dtype, tag: str, device: int = 0) -> torch.Tensor:
        tensor = torch.zeros(size, dtype=dtype)
        self.memory.setdefault(tag, []).append((tensor, device))
        return tensor

    def registrable_ranges(self, tag: str) -> list[Range]:
        if tag not in self.memory:
            raise UnknownTagError(f"no tag {tag!r}", tag=tag)
        if tag in self.asleep:
            return []
        generation = self.generations.get(tag, 0)
        return [Range(t.data_ptr(), t.nbytes, device, generation) for t, device in self.memory[tag]]

    def register_hooks(
        self, tag: str, *, before_unmap: Hook | None = None, after_map: Hook | None = None
    ) -> Hooks:
        self.registrable_ranges(tag)
        self.hooks.append(Hooks(self, tag, before_unmap, after_map))
        return self.hooks[-1]

    def pin(self, tag: str, holder: str = "?") -> Pin:
        self.pins.append(Pin(self, tag, holder))
        return self.pins[-1]

    def sleep(self, offload_tags: str | None = None, *, tags: str) -> None:
        ranges = self.registrable_ranges(tags)
        if not ranges:
            return
        ran: list[Hooks] = []
        try:
            for hooks in [h for h in self.hooks if h.tag == tags]:
                if hooks.before:
                    hooks.before(tags, ranges)
                ran.append(hooks)
            if holders := [pin.holder for pin in self.pins if pin.tag == tags]:
                raise InUseError(f"pinned by {holders}", operation="sleep", tag=tags)
        except Exception:
            for hooks in ran:
                if hooks.after:
                    hooks.after(tags, ranges)
            raise
        self.asleep.add(tags)

    def discard(self, tags: str) -> None:
        self.sleep(tags=tags)

    def wake_up(self, tags: str) -> SimpleNamespace:
        if tags not in self.asleep:
            return SimpleNamespace(problems=())
        self.asleep.remove(tags)
        self.generations[tags] = self.generations.get(tags, 0) + 1
        problems = []
        for hooks in [h for h in self.hooks if h.tag == tags and h.after]:
            try:
                hooks.after(tags, self.registrable_ranges(tags))  # type: ignore[misc]
            except RuntimeError as error:
                problems.append(str(error))
        return SimpleNamespace(problems=tuple(problems))


# ---- an agent that answers as NIXL 1.5 does


class AgentError(RuntimeError):
    pass


class FakeAgent:
    """Registers lists of ranges, refuses what NIXL refuses, and fails where it is told to."""

    def __init__(self, guard: Any, log: list[str] | None = None) -> None:
        self.guard = guard
        self.log = [] if log is None else log
        self.lists: list[list[tuple[int, int, int, str]]] = []
        self.serial = 0
        self.fail: dict[str, int] = {}
        self.backends_seen: list[list[str]] = []
        self.mem_types: set[str | None] = set()

    def _step(self, name: str) -> None:
        self.log.append(name)
        if name in self.fail:
            self.fail[name] -= 1
            if self.fail[name] < 0:
                raise AgentError(f"{name} failed")

    def get_reg_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        assert len(descs[0]) == 4  # descs[0] of an empty list fails, as in NIXL
        self._step("get_reg_descs")
        self.mem_types.add(mem_type)
        return list(descs)

    def get_xfer_descs(self, descs: Any, mem_type: str | None = None) -> Any:
        assert len(descs[0]) == 3
        self.mem_types.add(mem_type)
        return tuple(descs)

    def register_memory(
        self, reg_list: Any, mem_type: str | None = None, backends: list[str] | None = None
    ) -> Any:
        self._step("register")
        self.backends_seen.append(list(backends or ()))
        self.lists.append(reg_list)
        self.serial += 1
        return reg_list

    def deregister_memory(self, dereg_list: Any, backends: list[str] | None = None) -> None:
        self._step("deregister")
        assert dereg_list in self.lists, "NIXL_ERR_NOT_FOUND"
        assert self.guard.registrable_ranges("kv"), "deregistered after the memory was given up"
        self.lists.remove(dereg_list)

    def get_agent_metadata(self) -> bytes:
        self._step("metadata")
        return f"{self.serial}:{self.lists}".encode()


# ---- the guard: the model, and the allocator on the host driver where it has one

KINDS = ["model"]
if all(hasattr(CuMemAllocator, name) for name in GUARD_METHODS):
    KINDS.append("host")


@pytest.fixture(params=KINDS)
def guard(request: pytest.FixtureRequest) -> Iterator[Any]:
    if request.param == "model":
        model = ModelGuard()
        yield model
        assert (model.pins, model.hooks) == ([], [])
        return
    allocator = CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=256 * MIB))
    yield allocator
    allocator.close(force=True)


@pytest.fixture
def kv(guard: Any) -> torch.Tensor:
    return guard.empty(4 * MIB, dtype=torch.uint8, tag="kv")


@pytest.fixture
def agent(guard: Any, kv: torch.Tensor) -> FakeAgent:
    return FakeAgent(guard)


def sleeps(guard: Any) -> bool:
    """Whether the tag can sleep now; it is awake again afterwards."""
    try:
        guard.sleep(offload_tags="kv", tags="kv")
    except InUseError:
        return False
    guard.wake_up("kv")
    return True


def test_memory_is_registered_range_by_range(guard: Any, agent: FakeAgent) -> None:
    other = guard.empty(2 * MIB, dtype=torch.uint8, tag="kv")
    with RegisteredTag(agent, guard, "kv") as registered:
        expected = [(r.address, r.bytes, 0, "") for r in guard.registrable_ranges("kv")]
        assert agent.lists == [expected]
        assert other.data_ptr() in [address for address, *_ in expected]
        assert agent.mem_types == {"DRAM"}
        assert list(registered.ranges) == list(guard.registrable_ranges("kv"))
    assert agent.lists == []


def test_a_pool_on_cuda_is_registered_as_vram(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int] = []
    monkeypatch.setattr(
        torch.cuda, "device", lambda device: current.append(device) or _Nothing(current)
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: current[-1] == device)
    guard = ModelGuard(driver="cuda")
    for device in (0, 1, 0):
        guard.empty(MIB, dtype=torch.uint8, tag="kv", device=device)
    agent = FakeAgent(guard)
    register = agent.register_memory

    def checked(reg_list: Any, *args: Any, **kwargs: Any) -> Any:
        assert {device for _, _, device, _ in reg_list} == {current[-1]}
        return register(reg_list, *args, **kwargs)

    agent.register_memory = checked  # type: ignore[method-assign]
    with RegisteredTag(agent, guard, "kv"):
        assert [len(pieces) for pieces in agent.lists] == [2, 1]
        assert agent.mem_types == {"VRAM"}
    assert (agent.lists, current) == ([], [])


class _Nothing:
    def __init__(self, current: list[int]) -> None:
        self.current = current

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self.current.pop()


def test_a_sleep_deregisters_first_and_the_wake_registers_again(
    guard: Any, agent: FakeAgent
) -> None:
    news: list[tuple[bytes, int]] = []
    with RegisteredTag(agent, guard, "kv", on_metadata=lambda *new: news.append(new)) as registered:
        first = registered.metadata()
        agent.log.clear()
        guard.sleep(offload_tags="kv", tags="kv")
        assert agent.log == ["deregister"]
        assert not registered.registered
        assert (registered.ranges, registered.generation) == ((), 1)
        guard.wake_up("kv")
        assert agent.log == ["deregister", "get_reg_descs", "register", "metadata"]
        assert registered.registered
        assert registered.generation == 2
        second = registered.metadata()
    assert news == [(first, 1), (second, 2)]
    assert first != second


def test_a_discard_deregisters_too(guard: Any, agent: FakeAgent) -> None:
    with RegisteredTag(agent, guard, "kv") as registered:
        guard.discard("kv")
        assert agent.lists == []
        guard.wake_up("kv")
        assert registered.registered


def test_twenty_cycles_leak_no_registration_and_no_pin(guard: Any, agent: FakeAgent) -> None:
    registered = RegisteredTag(agent, guard, "kv")
    for cycle in range(20):
        guard.sleep(offload_tags="kv", tags="kv")
        assert agent.lists == []
        guard.wake_up("kv")
        assert len(agent.lists) == 1
        assert registered.generation == cycle + 2
        assert {each.generation for each in registered.ranges} == {
            each.generation for each in guard.registrable_ranges("kv")
        }
    registered.close()
    assert agent.lists == []
    assert agent.log.count("register") == agent.log.count("deregister") == 21
    assert sleeps(guard)


def test_a_registration_that_nobody_drops_keeps_the_tag_awake(guard: Any, kv: Any) -> None:
    with (
        guard.pin("kv", holder="raw registration"),
        refuses(InUseError, names="raw registration", operation="sleep", tag="kv"),
    ):
        guard.sleep(offload_tags="kv", tags="kv")
    assert sleeps(guard)


def test_a_sleep_that_another_pin_refuses_registers_again(guard: Any, agent: FakeAgent) -> None:
    with RegisteredTag(agent, guard, "kv") as registered:
        with guard.pin("kv", holder="somebody else"):
            with refuses(InUseError, names="somebody else", operation="sleep", tag="kv"):
                guard.sleep(offload_tags="kv", tags="kv")
            assert registered.registered
            assert registered.generation == 2
        assert sleeps(guard)


def test_an_agent_that_will_not_deregister_cancels_the_sleep(guard: Any, agent: FakeAgent) -> None:
    registered = RegisteredTag(agent, guard, "kv")
    agent.fail = {"deregister": 0}
    with pytest.raises(AgentError, match="deregister"):
        guard.sleep(offload_tags="kv", tags="kv")
    assert registered.registered
    assert len(agent.lists) == 1
    assert guard.registrable_ranges("kv")
    agent.fail = {}
    guard.sleep(offload_tags="kv", tags="kv")
    assert not registered.registered
    registered.close()


@pytest.mark.parametrize("step", ["get_reg_descs", "register", "metadata"])
def test_a_step_that_fails_in_the_constructor_leaves_nothing(
    guard: Any, agent: FakeAgent, step: str
) -> None:
    agent.fail = {step: 0}
    with pytest.raises(AgentError, match=step):
        RegisteredTag(agent, guard, "kv")
    assert agent.lists == []
    assert sleeps(guard)
    assert agent.lists == []


def test_a_callback_that_fails_in_the_constructor_leaves_nothing(
    guard: Any, agent: FakeAgent
) -> None:
    def refuse(metadata: bytes, generation: int) -> None:
        raise OSError("the peer is gone")

    with pytest.raises(OSError, match="the peer"):
        RegisteredTag(agent, guard, "kv", on_metadata=refuse)
    assert agent.lists == []
    assert sleeps(guard)


@pytest.mark.parametrize("step", ["get_reg_descs", "register", "metadata"])
def test_a_step_that_fails_after_a_wake_is_reported_and_can_be_repeated(
    guard: Any, agent: FakeAgent, step: str
) -> None:
    registered = RegisteredTag(agent, guard, "kv")
    guard.sleep(offload_tags="kv", tags="kv")
    agent.fail = {step: 0}
    report = guard.wake_up("kv")
    assert any(f"{step} failed" in problem for problem in report.problems)
    assert guard.registrable_ranges("kv")
    assert not registered.registered
    assert agent.lists == []
    with refuses(UnavailableError, names="refresh()", operation="metadata", tag="kv"):
        registered.metadata()
    agent.fail = {}
    assert registered.refresh() == 2
    assert registered.registered
    registered.close()


def test_a_callback_that_fails_after_a_wake_leaves_the_memory_registered(
    guard: Any, agent: FakeAgent
) -> None:
    def send(metadata: bytes, generation: int) -> None:
        if generation == 2:
            raise RuntimeError("the peer is gone")

    with RegisteredTag(agent, guard, "kv", on_metadata=send) as registered:
        guard.sleep(offload_tags="kv", tags="kv")
        assert any("the peer is gone" in text for text in guard.wake_up("kv").problems)
        assert registered.registered
        assert registered.metadata()


def test_one_device_that_fails_undoes_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device", lambda device: _Nothing([device]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: None)
    guard = ModelGuard(driver="cuda")
    for device in (0, 1):
        guard.empty(MIB, dtype=torch.uint8, tag="kv", device=device)
    agent = FakeAgent(guard)
    agent.fail = {"register": 1}
    with pytest.raises(AgentError, match="register"):
        RegisteredTag(agent, guard, "kv")
    assert (agent.lists, guard.pins, guard.hooks) == ([], [], [])


def test_what_cannot_be_undone_stays_pinned(guard: Any, agent: FakeAgent) -> None:
    registered = RegisteredTag(agent, guard, "kv")
    agent.fail = {"deregister": 0}
    with pytest.raises(AgentError, match="deregister"):
        registered.close()
    with refuses(InUseError, names="NIXL registration of 'kv'", operation="sleep", tag="kv"):
        guard.sleep(offload_tags="kv", tags="kv")
    agent.fail = {}
    registered.close()
    assert agent.lists == []
    assert sleeps(guard)


def test_a_tag_that_sleeps_is_registered_when_it_wakes(guard: Any, agent: FakeAgent) -> None:
    guard.sleep(offload_tags="kv", tags="kv")
    with RegisteredTag(agent, guard, "kv") as registered:
        assert (registered.registered, registered.generation) == (False, 0)
        with refuses(UnavailableError, operation="metadata", tag="kv"):
            registered.metadata()
        guard.wake_up("kv")
        assert (registered.registered, registered.generation) == (True, 1)


def test_refresh_registers_what_was_allocated_since(guard: Any, agent: FakeAgent) -> None:
    with RegisteredTag(agent, guard, "kv") as registered:
        late = guard.empty(2 * MIB, dtype=torch.uint8, tag="kv")
        with refuses(NotInPoolError, names="refresh()", tag="kv", bytes=2 * MIB):
            registered.xfer_descs(late)
        assert registered.refresh() == 2
        assert registered.xfer_descs(late) == ((late.data_ptr(), 2 * MIB, 0),)
        assert len(agent.lists) == 1


def test_transfer_lists_are_of_tensors_and_ranges(
    guard: Any, agent: FakeAgent, kv: torch.Tensor
) -> None:
    with RegisteredTag(agent, guard, "kv") as registered:
        blocks = kv.view(torch.float16).view(4, -1)
        size = blocks[0].nbytes
        assert registered.xfer_descs([blocks[1], blocks[3]]) == (
            (kv.data_ptr() + size, size, 0),
            (kv.data_ptr() + 3 * size, size, 0),
        )
        (each,) = registered.ranges
        assert registered.xfer_descs(each) == ((each.address, each.bytes, 0),)
        assert registered.xfer_descs(registered.ranges) == registered.xfer_descs(each)
        assert len(registered.xfer_descs([kv, kv[:0]])) == 1
        with refuses(InvalidArgumentError, names="contiguous"):
            registered.xfer_descs(blocks[:, :2])
        with refuses(InvalidArgumentError, names="nothing", tag="kv"):
            registered.xfer_descs([])
        with refuses(NotInPoolError, tag="kv", device=0, bytes=32):
            registered.xfer_descs(torch.zeros(8))
        with pytest.raises(NotInPoolError):
            registered.xfer_descs(Range(each.address + 1, each.bytes, 0, 0))
        for wrong in (3, ["kv"]):
            with pytest.raises(InvalidTypeError):
                registered.xfer_descs(wrong)  # type: ignore[arg-type]
        guard.sleep(offload_tags="kv", tags="kv")
        with pytest.raises(UnavailableError):
            registered.xfer_descs(kv)
        guard.wake_up("kv")


def test_backends_are_passed_on(guard: Any, agent: FakeAgent) -> None:
    with RegisteredTag(agent, guard, "kv", backends=("UCX",)):
        assert agent.backends_seen == [["UCX"]]
    with refuses(InvalidTypeError, names="backends"):
        RegisteredTag(agent, guard, "kv", backends="UCX")
    with refuses(InvalidTypeError, names="on_metadata"):
        RegisteredTag(agent, guard, "kv", on_metadata=3)  # type: ignore[arg-type]


def test_an_unknown_tag_is_refused(guard: Any, agent: FakeAgent) -> None:
    with pytest.raises(UnknownTagError):
        RegisteredTag(agent, guard, "kv_cash")
    assert agent.log == []


def test_after_close_it_is_over(guard: Any, agent: FakeAgent) -> None:
    registered = RegisteredTag(agent, guard, "kv")
    registered.close()
    registered.close()
    assert sleeps(guard)
    assert (agent.lists, registered.registered) == ([], False)
    for call in (registered.metadata, registered.refresh):
        with refuses(ClosedError, operation=call.__name__, tag="kv"):
            call()
    assert repr(registered) == "<RegisteredTag 'kv': closed, generation 1>"


def test_sleeps_and_refreshes_from_many_threads(guard: Any, agent: FakeAgent) -> None:
    registered = RegisteredTag(agent, guard, "kv")
    # The model has no turns of its own.
    turn = threading.Lock() if isinstance(guard, ModelGuard) else contextlib.nullcontext()
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        for _ in range(30):
            try:
                work()
            except (InUseError, TransitionInProgressError):
                pass  # a sleep met the pin of a refresh, or a refresh met a sleep
            except BaseException as error:  # noqa: BLE001 - handed to the test
                errors.append(error)

    def cycle() -> None:
        with turn:
            try:
                guard.sleep(offload_tags="kv", tags="kv")
            finally:
                guard.wake_up("kv")

    def refresh() -> None:
        with turn:
            registered.refresh()

    threads = [threading.Thread(target=run, args=(work,)) for work in (cycle, cycle, refresh)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    registered.refresh()
    assert registered.registered
    assert len(agent.lists) == 1
    registered.close()
    assert agent.lists == []


# ---- agents


class FakePeers:
    def __init__(self) -> None:
        self.calls: list[object] = []

    def remove_remote_agent(self, agent: str) -> None:
        self.calls.append(("remove", agent))

    def add_remote_agent(self, metadata: bytes) -> bytes:
        self.calls.append(("add", metadata))
        return b"prefill"


def test_a_peer_is_removed_before_its_new_metadata_is_loaded() -> None:
    peers = FakePeers()
    assert replace_remote_agent(peers, "prefill", b"new") == "prefill"
    assert peers.calls == [("remove", "prefill"), ("add", b"new")]


def fake_nixl(name: str, plugins: list[str]) -> ModuleType:
    module = ModuleType(name)
    sync = SimpleNamespace(NIXL_THREAD_SYNC_STRICT="strict")

    def agent(agent_name: str, settings: dict[str, Any]) -> SimpleNamespace:
        started = {b: 1 for b in settings["backends"] if b in plugins}
        return SimpleNamespace(
            name=agent_name, settings=settings, backends=started, get_plugin_list=lambda: plugins
        )

    module.nixl_agent = agent  # type: ignore[attr-defined]
    module.nixl_agent_config = dict  # type: ignore[attr-defined]
    module.nixl_thread_sync_t = sync  # type: ignore[attr-defined]
    return module


@pytest.fixture
def no_nixl(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nixl", "nixl_cu13", "nixl_cu12"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("no_nixl")
def test_without_nixl_the_error_says_what_to_install() -> None:
    assert not is_installed()
    with refuses(UnavailableError, operation="create_agent", advice="pip install nixl"):
        create_agent("prefill")


@pytest.mark.usefixtures("no_nixl")
@pytest.mark.parametrize("name", ["nixl", "nixl_cu13", "nixl_cu12"])
def test_any_package_of_nixl_will_do(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, fake_nixl(name, ["UCX", "POSIX"]))
    agent = create_agent("prefill", num_threads=2)
    assert agent.name == "prefill"
    assert agent.settings == {"backends": ["UCX"], "num_threads": 2, "sync_mode": "strict"}
    assert create_agent("decode", sync_mode="rw").settings["sync_mode"] == "rw"
    with refuses(UnavailableError, names=("GDS", "UCX, POSIX"), operation="create_agent"):
        create_agent("prefill", backends=["UCX", "GDS"])


@pytest.mark.usefixtures("no_nixl")
def test_a_nixl_without_thread_modes_is_given_none(monkeypatch: pytest.MonkeyPatch) -> None:
    older = fake_nixl("nixl", ["UCX"])
    del older.nixl_thread_sync_t
    monkeypatch.setitem(sys.modules, "nixl", older)
    assert create_agent("prefill").settings == {"backends": ["UCX"]}


def test_the_package_does_not_import_the_adapter(run_python: RunPython) -> None:
    done: Done = run_python(
        "import sys, cumempool\n"
        "assert 'cumempool.integrations.nixl' not in sys.modules\n"
        "import cumempool.integrations.nixl\n"
        "assert not {'torch', 'nixl', 'nixl_cu13', 'nixl_cu12'} & set(sys.modules)\n"
    )
    assert (done.code, done.err) == (0, "")


# ---- NIXL itself, over TCP between two agents of one process

REAL = """
import os, sys, time
os.environ["UCX_TLS"] = "cuda_copy,tcp,self"
os.environ["NIXL_LOG_LEVEL"] = "WARN"
import torch
from test_nixl import MIB, KINDS, ModelGuard
from cumempool import CuMemAllocator, CuMemConfig
from cumempool.integrations.nixl import RegisteredTag, create_agent, replace_remote_agent

def make():
    if "host" not in KINDS:
        return ModelGuard()
    return CuMemAllocator(CuMemConfig(driver="host", host_driver_bytes=64 * MIB))

agents = [create_agent(name) for name in ("prefill", "decode")]
guards = [make(), make()]
caches = [guard.empty(4 * MIB, dtype=torch.uint8, tag="kv") for guard in guards]
tags = [RegisteredTag(agents[i], guards[i], "kv") for i in (0, 1)]

def exchange():
    for here, there in ((0, 1), (1, 0)):
        agents[here].remove_remote_agent(agents[there].name)
    for here, there in ((0, 1), (1, 0)):
        name = replace_remote_agent(agents[here], agents[there].name, tags[there].metadata())
        assert name == agents[there].name

def move(operation, here, there):
    handle = agents[here].initialize_xfer(
        operation, tags[here].xfer_descs(caches[here]), tags[there].xfer_descs(caches[there]),
        agents[there].name)
    state, deadline = agents[here].transfer(handle), time.monotonic() + 30
    while state == "PROC" and time.monotonic() < deadline:
        state = agents[here].check_xfer_state(handle)
    agents[here].release_xfer_handle(handle)
    assert state == "DONE", state

for cycle in range(6):
    exchange()
    caches[0].random_(256)
    caches[1].zero_()
    move("WRITE", 0, 1)
    assert torch.equal(caches[0], caches[1])
    caches[0].random_(256)
    move("READ", 1, 0)
    assert torch.equal(caches[0], caches[1])
    sleeper = guards[cycle % 2]
    sleeper.sleep(offload_tags="kv", tags="kv")
    assert not tags[cycle % 2].registered
    sleeper.wake_up("kv")
    assert tags[cycle % 2].generation == cycle // 2 + 2
for tag in tags:
    tag.close()
print("6 cycles")
"""


@pytest.mark.skipif(not is_installed(), reason="NIXL is not installed: pip install nixl")
def test_nixl_itself_moves_the_bytes_after_every_wake(
    run_python: RunPython, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    done = run_python(REAL)
    assert done.code == 0, done.err
    assert done.out.endswith("6 cycles\n")
