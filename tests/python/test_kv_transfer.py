"""KV connectors against memory settings: tables over every connector, variable and spelling."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import logging
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import RunPython
from refusals import refuses

from cumempool import CuMemConfig, InvalidArgumentError, InvalidTypeError
from cumempool.integrations.kv_transfer import (
    ALLOCATOR_VARIABLES,
    CONNECTORS,
    Connector,
    KVTransferConfig,
    expandable_segments,
    find_connector,
    verify_kv_transfer_compat,
)

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kv-transfer.md"

OFF = CuMemConfig(driver="host")
POOLS = CuMemConfig(driver="host", enable_cumem_allocator=True)
SLEEP = CuMemConfig(driver="host", enable_sleep_mode=True)
EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
UNKNOWN = "HouseConnector"

#: Every connector by every name, and one that nobody knows.
SPELLINGS = [
    (spelled, connector)
    for connector in CONNECTORS
    for name in (connector.name, *connector.aliases)
    for spelled in (name, name.lower(), f" {name} ")
]
REGISTERING = [connector for connector in CONNECTORS if connector.registers]
COPYING = [connector for connector in CONNECTORS if not connector.registers]


def ids(connectors: list[Connector]) -> list[str]:
    return [connector.name for connector in connectors]


def verify(config: CuMemConfig, connector: str, environ: Any = None, **more: Any) -> list[str]:
    kv = KVTransferConfig(connector)
    return verify_kv_transfer_compat(config, kv, environ=environ or {}, live={}, **more)


# ---- the table


def test_the_table_has_the_connectors_that_users_name() -> None:
    names = {connector.name for connector in CONNECTORS}
    assert names >= {
        "NixlConnector",
        "MooncakeConnector",
        "MooncakeStoreConnector",
        "LMCacheConnectorV1",
        "LMCacheMPConnector",
        "MoRIIOConnector",
        "P2pNcclConnector",
        "OffloadingConnector",
        "ExampleConnector",
        "HF3FSKVConnector",
        "FlexKVConnectorV1",
        "DecodeBenchConnector",
        "SimpleCPUOffloadConnector",
    }
    assert find_connector("SharedStorageConnector") is find_connector("ExampleConnector")


def test_no_name_stands_for_two_connectors() -> None:
    names = [name.casefold() for c in CONNECTORS for name in (c.name, *c.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(("spelled", "connector"), SPELLINGS)
def test_every_spelling_of_a_name_is_found(spelled: str, connector: Connector) -> None:
    assert find_connector(spelled) is connector


@pytest.mark.parametrize("connector", CONNECTORS, ids=ids(list(CONNECTORS)))
def test_a_connector_is_consistent(connector: Connector) -> None:
    assert connector.registers or connector.follows_remap
    assert connector.registers or not (connector.legacy_ipc or connector.over_ucx)


def test_the_table_of_the_documentation_says_the_same() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| (yes|no) \| ([^|]*) \|", DOCS.read_text(), re.MULTILINE
    )
    assert [(name, how, follows) for name, how, follows, _ in rows] == [
        (c.name, "registered" if c.registers else "copied", "yes" if c.follows_remap else "no")
        for c in CONNECTORS
    ]
    registered = [row for row in rows if row[1] == "registered"]
    assert [name for name, *_, over in registered if "CUDA IPC" in over] == [
        c.name for c in CONNECTORS if c.legacy_ipc
    ]
    assert [name for name, *_, over in registered if "UCX" in over] == [
        c.name for c in CONNECTORS if c.over_ucx
    ]


# ---- expandable segments

ON = ["True", "true", "TRUE", "1", "yes", "on"]
NOT_ON = ["False", "false", "0", "no", "off"]
SHAPES = [
    "expandable_segments:{}",
    " expandable_segments : {} ",
    "expandable_segments:{},",
    "Expandable_Segments:{}",
    "max_split_size_mb:64,expandable_segments:{}",
    "expandable_segments:{}, garbage_collection_threshold:0.8",
    "roundup_power2_divisions:[256:1,512:2,>:4],expandable_segments:{}",
    "expandable_segments:{},roundup_power2_divisions:[256:1,expandable_segments:maybe,>:4]",
    "expandable_segments:False,expandable_segments:{}",
    "expandable_segments:True,expandable_segments:{}",
    "\texpandable_segments:{}\n",
]


@pytest.mark.parametrize("variable", ALLOCATOR_VARIABLES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", ON + NOT_ON)
def test_every_spelling_of_the_option_is_read(variable: str, shape: str, value: str) -> None:
    text = shape.format(value)
    found = expandable_segments({variable: text}, {})
    assert found.on is (value in ON)
    assert found.source == f"{variable}={text!r}"


@pytest.mark.parametrize("value", ["maybe", "", "2", "Truee"])
def test_a_value_that_is_neither_is_not_guessed(value: str) -> None:
    assert expandable_segments({ALLOCATOR_VARIABLES[0]: f"expandable_segments:{value}"}, {}).on is (
        None
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "max_split_size_mb:64",
        "my_expandable_segments:True",
        "expandable_segments_x:True",
        "a:[expandable_segments:True]",
        "a:[1,expandable_segments:True,2],b:3",
    ],
)
def test_without_the_option_they_are_off(text: str) -> None:
    assert expandable_segments({ALLOCATOR_VARIABLES[1]: text}, {}).on is False


def test_without_a_variable_they_are_off() -> None:
    found = expandable_segments({"PATH": "/bin"}, {})
    assert (found.on, found.source) == (False, "no allocator variable is set")


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(ALLOCATOR_VARIABLES, 2)))
def test_the_first_variable_that_is_set_counts(first: str, second: str) -> None:
    on, off = "expandable_segments:True", "expandable_segments:False"
    assert expandable_segments({second: on, first: off}, {}).on is False
    assert expandable_segments({second: off, first: on}, {}).on is True
    assert expandable_segments({second: on, first: ""}, {}).on is False


@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_setAllocatorSettings"),
    reason="this torch reads its allocator's variables only where it has a GPU",
)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_torch_reads_the_variables_in_this_order(
    run_python: RunPython, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    for variable in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    for variable in ALLOCATOR_VARIABLES[-count:]:
        monkeypatch.setenv(variable, f"expandable_segments:{variable}")
    set_anything = (
        "import torch\ntorch._C._accelerator_setAllocatorSettings('max_split_size_mb:64')"
    )
    # torch names the value that it cannot read, and with it the variable that it reads.
    assert f"got '{ALLOCATOR_VARIABLES[-count]}'" in run_python(set_anything).err
    monkeypatch.setenv(ALLOCATOR_VARIABLES[-count], "")
    assert run_python(set_anything).code == 0


def test_the_live_setting_overrules_the_variables() -> None:
    off = {ALLOCATOR_VARIABLES[0]: "expandable_segments:False"}
    assert expandable_segments(EXPANDABLE, {"expandable_segments": False}).on is False
    found = expandable_segments(off, {"expandable_segments": True})
    assert found.on is True
    assert found.source == "the live allocator setting expandable_segments=True"
    assert expandable_segments(off, {"expandable_segments": "true"}).on is True
    text = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    assert expandable_segments(off, text).source.startswith("the live allocator setting PYTORCH")
    assert expandable_segments(off, text).on is True


def test_the_environment_is_read_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ALLOCATOR_VARIABLES:
        monkeypatch.delenv(variable, raising=False)
    assert expandable_segments(live={}).on is False
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "expandable_segments:1")
    assert expandable_segments(live={}).on is True
    assert expandable_segments().on is True  # CUDA is not in use here, so torch has no say


def test_asking_imports_no_torch(run_python: RunPython) -> None:
    done = run_python(
        "import sys\n"
        "from cumempool.integrations.kv_transfer import *\n"
        "from cumempool import CuMemConfig\n"
        "assert expandable_segments().on is False\n"
        "verify_kv_transfer_compat(CuMemConfig(), KVTransferConfig('NixlConnector'))\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert (done.code, done.err) == (0, "")


# ---- rule 4: expandable segments


@pytest.mark.parametrize("value", ON + NOT_ON)
@pytest.mark.parametrize("variable", ALLOCATOR_VARIABLES)
@pytest.mark.parametrize("name", [c.name for c in CONNECTORS] + [UNKNOWN])
def test_rule_4_over_every_connector_and_variable(name: str, variable: str, value: str) -> None:
    environ = {variable: f"expandable_segments:{value}"}
    connector = find_connector(name)
    registers = connector is None or connector.registers
    if not registers or value in NOT_ON:
        verify(OFF, name, environ)
    else:
        with pytest.raises(InvalidArgumentError) as caught:
            verify(OFF, name, environ)
        text = str(caught.value)
        assert name in text
        assert f"{variable}='expandable_segments:{value}'" in text
        assert "IBV_WC_REM_ACCESS_ERR" in text
        assert "enable_cumem_allocator=True" in text
        assert "expandable_segments:False" in text
    verify(POOLS, name, environ)


def test_rule_4_goes_by_the_live_setting() -> None:
    kv = KVTransferConfig("NixlConnector")
    with refuses(
        InvalidArgumentError,
        names=("NixlConnector", "live", "expandable_segments=True"),
        operation="verify",
    ):
        verify_kv_transfer_compat(OFF, kv, environ={}, live={"expandable_segments": True})
    live = {"expandable_segments": False}
    assert verify_kv_transfer_compat(OFF, kv, environ=EXPANDABLE, live=live) == []


@pytest.mark.parametrize("connector", REGISTERING, ids=ids(REGISTERING))
def test_a_setting_that_cannot_be_read_is_a_warning(connector: Connector) -> None:
    environ = {"PYTORCH_ALLOC_CONF": "expandable_segments:maybe"}
    (text,) = verify(OFF, connector.name, environ)
    assert "cannot tell" in text
    assert connector.name in text


@pytest.mark.parametrize("connector", COPYING, ids=ids(COPYING))
@pytest.mark.parametrize("config", [OFF, POOLS, SLEEP], ids=["off", "pools", "sleep"])
def test_connectors_that_copy_go_with_everything(config: CuMemConfig, connector: Connector) -> None:
    for value in [*ON, *NOT_ON, "maybe"]:
        environ = {"PYTORCH_ALLOC_CONF": f"expandable_segments:{value}"}
        assert verify(config, connector.name, environ) == []


# ---- rule 6: sleep mode


@pytest.mark.parametrize("name", [c.name for c in CONNECTORS] + [UNKNOWN])
def test_rule_6_over_every_connector(name: str) -> None:
    connector = find_connector(name)
    if connector is not None and connector.follows_remap:
        verify(SLEEP, name)
    else:
        with refuses(
            InvalidArgumentError, names=(name, "remap", "follows_remap=True"), operation="verify"
        ):
            verify(SLEEP, name)
    verify(SLEEP, name, kv_sleeps=False)
    verify(POOLS, name)
    kv = KVTransferConfig(name, follows_remap=True)
    verify_kv_transfer_compat(SLEEP, kv, environ={}, live={})


def test_a_program_can_say_that_its_connector_does_not_follow() -> None:
    kv = KVTransferConfig("NixlConnector", follows_remap=False)
    with refuses(InvalidArgumentError, names=("NixlConnector", "remap"), operation="verify"):
        verify_kv_transfer_compat(SLEEP, kv, environ={}, live={})


# ---- backings, and what they cost


def test_memory_that_cannot_sleep_contradicts_sleep_mode() -> None:
    with refuses(InvalidArgumentError, names='backing="cuda_malloc"'):
        verify(SLEEP, "NixlConnector", kv_backing="cuda_malloc")
    with refuses(InvalidArgumentError, names='backing="cuda_malloc"'):
        verify_kv_transfer_compat(SLEEP, None, environ={}, live={}, kv_backing="cuda_malloc")
    assert verify(SLEEP, "NixlConnector", kv_backing="cuda_malloc", kv_sleeps=False) == []
    assert verify(POOLS, "NixlConnector", kv_backing="cuda_malloc") == []
    with refuses(InvalidArgumentError, names=("kv_sleeps=True", "enable_sleep_mode=False")):
        verify(POOLS, "NixlConnector", kv_sleeps=True)
    with refuses(InvalidArgumentError, names=("kv_backing='malloc'", "'vmm', 'cuda_malloc'")):
        verify(POOLS, "NixlConnector", kv_backing="malloc")


@pytest.mark.parametrize("fabric", [None, False])
def test_virtual_memory_over_ucx_is_warned_of_with_its_cost(
    fabric: bool | None, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "cumempool"):
        (text,) = verify(POOLS, "NixlConnector", fabric=fabric)
    assert caplog.messages == [text]
    for part in ("0.5 GB/s", "300 GB/s", "TCP", "FABRIC", "IMEX", 'backing="cuda_malloc"'):
        assert part in text
    assert ("if it has no FABRIC" in text) is (fabric is None)


def test_nothing_is_warned_of_where_ucx_has_a_way() -> None:
    assert verify(POOLS, "NixlConnector", fabric=True) == []
    assert verify(OFF, "NixlConnector", fabric=False) == []
    assert verify(POOLS, "MooncakeConnector", fabric=False) == []
    kv = KVTransferConfig("NixlConnector", {"backends": ["LIBFABRIC"]})
    assert verify_kv_transfer_compat(POOLS, kv, environ={}, live={}) == []


@pytest.mark.parametrize("name", [c.name for c in CONNECTORS if c.legacy_ipc])
def test_connectors_by_cuda_ipc_are_told_of_the_backing_they_need(name: str) -> None:
    (text,) = verify(POOLS, name)
    assert "cudaIpcGetMemHandle" in text
    assert 'backing="cuda_malloc"' in text
    assert verify(POOLS, name, kv_backing="cuda_malloc") == []


def test_a_connector_that_nobody_knows_is_taken_to_register() -> None:
    (text,) = verify(POOLS, UNKNOWN)
    assert UNKNOWN in text
    assert "taken to register" in text


def test_nixl_from_host_memory_registers_none_of_the_gpu() -> None:
    kv = KVTransferConfig.from_dict({"kv_connector": "NixlConnector", "kv_buffer_device": "cpu"})
    assert verify_kv_transfer_compat(OFF, kv, environ=EXPANDABLE, live={}) == []
    assert verify_kv_transfer_compat(SLEEP, kv, environ={}, live={}) == []


def test_the_configuration_checks_itself() -> None:
    config = CuMemConfig(enable_sleep_mode=True, driver="host")
    assert config.verify_kv_transfer_compat(None) == []
    nixl = KVTransferConfig(connector="NixlConnector")
    assert config.verify_kv_transfer_compat(nixl, fabric=True) == []
    assert len(config.verify_kv_transfer_compat(nixl, fabric=False)) == 1
    mooncake = KVTransferConfig(connector="MooncakeConnector")
    with refuses(InvalidArgumentError, names=("MooncakeConnector", "remap"), operation="verify"):
        config.verify_kv_transfer_compat(mooncake)
    assert config.verify_kv_transfer_compat(mooncake, kv_sleeps=False) == []


def test_without_a_connector_there_is_nothing_to_check() -> None:
    for kv in (None, KVTransferConfig(), KVTransferConfig.from_dict(None)):
        assert verify_kv_transfer_compat(SLEEP, kv, environ=EXPANDABLE, live={}) == []


# ---- several connectors


def multi(*parts: dict[str, Any], **settings: Any) -> KVTransferConfig:
    extra = {"connectors": list(parts)}
    return KVTransferConfig.from_dict(
        {"kv_connector": "MultiConnector", "kv_connector_extra_config": extra, **settings}
    )


def test_a_multi_connector_is_as_strict_as_its_parts() -> None:
    nixl = {"kv_connector": "NixlConnector"}
    copies = {"kv_connector": "OffloadingConnector"}
    mooncake = {"kv_connector": "MooncakeConnector"}
    both = multi(nixl, copies)
    with refuses(
        InvalidArgumentError,
        names=(" NixlConnector ", "expandable_segments:True"),
        operation="verify",
    ):
        verify_kv_transfer_compat(OFF, both, environ=EXPANDABLE, live={})
    assert verify_kv_transfer_compat(OFF, multi(copies), environ=EXPANDABLE, live={}) == []
    assert verify_kv_transfer_compat(SLEEP, both, environ={}, live={}, fabric=True) == []
    with refuses(InvalidArgumentError, names=(" MooncakeConnector ", "remap"), operation="verify"):
        verify_kv_transfer_compat(SLEEP, multi(nixl, mooncake), environ={}, live={})
    with refuses(
        InvalidArgumentError,
        names=(" NixlConnector, MooncakeConnector ", "expandable_segments:True"),
        operation="verify",
    ):
        verify_kv_transfer_compat(OFF, multi(nixl, mooncake), environ=EXPANDABLE, live={})


def test_parts_are_found_at_any_depth_and_take_over_what_they_do_not_say() -> None:
    inner = {
        "kv_connector": "multiconnector",
        "kv_connector_extra_config": {
            "connectors": [
                {"kv_connector": "MooncakeConnector"},
                {"kv_connector": "MoRIIOConnector", "follows_remap": False},
            ]
        },
    }
    parts = multi(inner, {"kv_connector": "NixlConnector"}, follows_remap=True).parts()
    assert [(part.connector, part.follows_remap) for part in parts] == [
        ("MooncakeConnector", True),
        ("MoRIIOConnector", False),
        ("NixlConnector", True),
    ]


@pytest.mark.parametrize(
    ("extra", "error"),
    [
        ({}, InvalidArgumentError),
        ({"connectors": []}, InvalidArgumentError),
        ({"connectors": [{}]}, InvalidArgumentError),
        ({"connectors": [{"kv_role": "kv_both"}]}, InvalidArgumentError),
        ({"connectors": "NixlConnector"}, InvalidTypeError),
        ({"connectors": ["NixlConnector"]}, InvalidTypeError),
        ({"connectors": [{"kv_connector": 3}]}, InvalidTypeError),
    ],
)
def test_a_multi_connector_without_parts_is_refused(
    extra: dict[str, Any], error: type[InvalidArgumentError]
) -> None:
    with pytest.raises(error):
        KVTransferConfig("MultiConnector", extra)


# ---- what users write

VLLM: dict[str, Any] = {
    "kv_connector": "NixlConnector",
    "kv_role": "kv_both",
    "kv_buffer_device": "cuda",
    "engine_id": "a",
    "kv_port": 14579,
    "kv_connector_extra_config": {"backends": ["UCX"], "num_threads": 4},
}


def test_what_vllm_takes_is_taken() -> None:
    kv = KVTransferConfig.from_json(json.dumps(VLLM))
    assert kv == KVTransferConfig.from_dict(VLLM)
    assert kv.connector == "NixlConnector"
    assert kv.extra == {"backends": ("UCX",), "num_threads": 4}
    assert kv.parts() == (kv,)
    ours = {"connector": "NixlConnector", "extra": VLLM["kv_connector_extra_config"]}
    assert KVTransferConfig.from_dict(ours) == kv
    assert KVTransferConfig.from_json("null") == KVTransferConfig()
    assert KVTransferConfig.from_dict({"kv_connector": None}).parts() == ()


def test_it_cannot_be_changed_from_outside_or_inside() -> None:
    given: dict[str, Any] = {"backends": ["UCX"]}
    kv = KVTransferConfig("NixlConnector", given)
    given["backends"].append("GDS")
    assert kv.extra["backends"] == ("UCX",)
    with pytest.raises(TypeError):
        kv.extra["backends"] = ()  # type: ignore[index]
    with pytest.raises(dataclasses.FrozenInstanceError):
        kv.connector = "MooncakeConnector"  # type: ignore[misc]


def test_it_is_copied_pickled_and_hashed() -> None:
    for kv in (KVTransferConfig.from_dict(VLLM), multi(VLLM), KVTransferConfig()):
        assert pickle.loads(pickle.dumps(kv)) == kv
        assert copy.deepcopy(kv) == kv
        assert hash(kv) == hash(copy.copy(kv))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ("NixlConnector", InvalidTypeError),
        ({"kv_connector": 1}, InvalidTypeError),
        ({"kv_connector": ""}, InvalidArgumentError),
        ({"kv_connector": "A", "connector": "A"}, InvalidArgumentError),
        ({"kv_connector": "A", "kv_connector_extra_config": []}, InvalidTypeError),
        ({"kv_connector": "A", "kv_buffer_device": 1}, InvalidTypeError),
        ({"kv_connector": "A", "follows_remap": "yes"}, InvalidTypeError),
    ],
)
def test_what_makes_no_sense_is_refused(settings: Any, error: type[InvalidArgumentError]) -> None:
    with pytest.raises(error):
        KVTransferConfig.from_dict(settings)


@pytest.mark.parametrize("text", ["", "{", "NixlConnector", "[1]", "3"])
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError):
        KVTransferConfig.from_json(text)
    with pytest.raises(InvalidTypeError):
        KVTransferConfig.from_json(VLLM)  # type: ignore[arg-type]
