"""Configuration: one object from keywords, command line and environment, and its rules."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import logging
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from refusals import refuses

import cumempool
import cumempool.config as config_module
from cumempool import Backup
from cumempool.config import SETTINGS, Above, CuMemConfig, Setting, parse_bytes, settings_table
from cumempool.errors import InvalidArgumentError, InvalidTypeError, UnavailableError

GIB = 1 << 30


@pytest.fixture(autouse=True)
def everything_can_be_loaded(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU; tests of what is missing are marked otherwise."""
    if "what_is_there" not in request.fixturenames:
        monkeypatch.setattr(config_module, "_missing", lambda driver: "")


@pytest.fixture
def what_is_there() -> None:
    """Has a test look at the machine that it runs on."""


def parse(*arguments: str, prefix: str = "") -> CuMemConfig:
    parser = CuMemConfig.add_cli_args(argparse.ArgumentParser(), prefix=prefix)
    return CuMemConfig.from_cli_args(parser.parse_args(arguments), prefix=prefix)


def test_defaults() -> None:
    config = CuMemConfig()
    assert dataclasses.asdict(config) == {
        "enable_sleep_mode": False,
        "enable_cumem_allocator": None,
        "driver": "cuda",
        "host_backup_limit": None,
        "host_backup_overflow": None,
        "retain_backups": True,
        "nvtx": False,
        "out_of_memory_directory": None,
        "publish": False,
        "host_driver_devices": 1,
        "host_driver_bytes": 8 * GIB,
    }
    assert not config.cumem_allocator_enabled


def test_the_directory_for_out_of_memory_must_exist(tmp_path: Path) -> None:
    assert CuMemConfig(out_of_memory_directory=str(tmp_path)).out_of_memory_directory
    for wrong in (str(tmp_path / "missing"), ""):
        with refuses(InvalidArgumentError, names=f"out_of_memory_directory={wrong!r}"):
            CuMemConfig(out_of_memory_directory=wrong)
    with refuses(InvalidArgumentError, names="CUMEMPOOL_OUT_OF_MEMORY_DIRECTORY"):
        CuMemConfig.from_env({"CUMEMPOOL_OUT_OF_MEMORY_DIRECTORY": str(tmp_path / "missing")})
    with refuses(InvalidTypeError, names=("out_of_memory_directory", "PosixPath")):
        CuMemConfig(out_of_memory_directory=tmp_path)  # type: ignore[arg-type]


def test_immutable_keyword_only_hashable_and_picklable() -> None:
    config = CuMemConfig(enable_sleep_mode=True, driver="host")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.driver = "cuda"  # type: ignore[misc]
    with pytest.raises(TypeError):
        CuMemConfig(True)  # type: ignore[call-arg]
    assert {config: 1}[pickle.loads(pickle.dumps(config))] == 1
    assert dataclasses.replace(config, driver="cuda").driver == "cuda"


# ---- sleep mode and the allocator


def test_sleep_mode_switches_the_allocator_on() -> None:
    config = CuMemConfig(enable_sleep_mode=True)
    assert config.enable_cumem_allocator is True
    assert config.cumem_allocator_enabled
    assert config == CuMemConfig(enable_sleep_mode=True, enable_cumem_allocator=True)


def test_switching_the_allocator_on_is_logged_once_per_process(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(config_module, "_logged", set())
    with caplog.at_level(logging.INFO, logger="cumempool"):
        CuMemConfig(enable_sleep_mode=True, enable_cumem_allocator=True)
        CuMemConfig(enable_cumem_allocator=True)
        assert not caplog.records
        for _ in range(3):
            CuMemConfig(enable_sleep_mode=True)
    assert [(record.name, record.levelname) for record in caplog.records] == [("cumempool", "INFO")]
    assert "enable_cumem_allocator" in caplog.text


def test_sleep_mode_with_an_explicit_no_to_the_allocator_is_an_error() -> None:
    with refuses(
        InvalidArgumentError, names=("enable_sleep_mode=True", "enable_cumem_allocator=False")
    ):
        CuMemConfig(enable_sleep_mode=True, enable_cumem_allocator=False)
    with pytest.raises(InvalidArgumentError):
        parse("--enable-sleep-mode", "--no-enable-cumem-allocator")
    with pytest.raises(InvalidArgumentError):
        CuMemConfig.from_env(
            {"CUMEMPOOL_ENABLE_SLEEP_MODE": "1", "CUMEMPOOL_ENABLE_CUMEM_ALLOCATOR": "0"}
        )


@pytest.mark.parametrize("setting", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_asking_for_what_the_platform_lacks_is_a_value_error(setting: str) -> None:
    config = CuMemConfig(**{setting: True})  # type: ignore[arg-type]
    missing = SimpleNamespace(
        ok=False, reason="libcuda.so.1 was not found", hint="install a driver"
    )
    with refuses(
        UnavailableError,
        names=(setting, "driver='cuda'", "libcuda.so.1 was not found"),
        operation="verify",
        advice="install a driver",
    ):
        config.verify(missing)


def test_verify_passes_where_the_platform_has_it() -> None:
    CuMemConfig(enable_sleep_mode=True).verify(SimpleNamespace(ok=True, reason="", hint=""))


def test_verify_probes_the_configured_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    probed = []

    def probe(config: CuMemConfig) -> SimpleNamespace:
        probed.append(config)
        return SimpleNamespace(ok=False, reason="no device", hint="")

    monkeypatch.setattr(Above, "of_package", dataclasses.replace(Above.of_package, probe=probe))
    config = CuMemConfig(enable_cumem_allocator=True, driver="host")
    with refuses(
        UnavailableError, names=("driver='host'", "no device"), operation="verify", advice=""
    ):
        config.verify()
    assert probed == [config]


def test_verify_looks_at_nothing_where_the_allocator_is_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        Above, "of_package", dataclasses.replace(Above.of_package, probe=pytest.fail)
    )
    for config in (CuMemConfig(), CuMemConfig(enable_cumem_allocator=False)):
        config.verify()
        config.verify(SimpleNamespace(ok=False, reason="none", hint=""))


@pytest.mark.parametrize("on", [False, True])
def test_construction_loads_no_more_than_the_library(on: bool) -> None:
    code = (
        "import sys, cumempool.config as c; before = set(sys.modules); "
        f"c.CuMemConfig(enable_sleep_mode={on}, driver='host'); c.CuMemConfig.from_env({{}}); "
        "print(*(n for n in set(sys.modules) - before if 'cumempool' in n or 'torch' in n))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    loaded = "cumempool._core" if on else ""
    assert (done.returncode, done.stdout.strip()) == (0, loaded), done.stderr


@pytest.mark.parametrize("setting", ["enable_sleep_mode", "enable_cumem_allocator"])
def test_a_config_that_is_on_where_libcuda_is_missing_is_a_value_error(
    setting: str, monkeypatch: pytest.MonkeyPatch, what_is_there: None
) -> None:
    def nowhere(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", nowhere)
    with refuses(
        UnavailableError,
        names=(
            f"{setting}=True",
            "driver='cuda'",
            "libcuda.so.1: cannot open",
            "NVIDIA driver",
            "driver='host'",
        ),
        operation="verify",
    ):
        CuMemConfig(driver="cuda", **{setting: True})  # type: ignore[arg-type]
    assert CuMemConfig(driver="host", **{setting: True}).cumem_allocator_enabled  # type: ignore[arg-type]
    assert not CuMemConfig(driver="cuda").cumem_allocator_enabled
    CuMemConfig(driver="cuda", enable_cumem_allocator=False)


def test_a_config_that_is_on_where_the_library_is_missing_is_a_value_error(
    monkeypatch: pytest.MonkeyPatch, what_is_there: None
) -> None:
    monkeypatch.setitem(sys.modules, "cumempool._core", None)
    monkeypatch.delattr(cumempool, "_core", raising=False)
    with refuses(UnavailableError, names=("driver='host'", "cumempool._core"), operation="verify"):
        CuMemConfig(driver="host", enable_sleep_mode=True)


# ---- the pool scope


def test_pool_scope_is_a_null_context_when_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cumempool.allocator", None)  # an import would raise
    scope = CuMemConfig().maybe_use_memory_pool("weights", on_sleep="discard")
    assert isinstance(scope, nullcontext)
    with scope:
        entered = True
    assert entered


def test_pool_scope_is_the_allocators_when_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    class CuMemAllocator:
        @classmethod
        def get_instance(cls, config: object) -> CuMemAllocator:
            return cls()

        @contextmanager
        def use_memory_pool(self, tag: str, **policy: object) -> Iterator[None]:
            calls.append((tag, policy))
            yield

    module: Any = ModuleType("cumempool.allocator")
    module.CuMemAllocator = CuMemAllocator
    monkeypatch.setitem(sys.modules, "cumempool.allocator", module)
    with CuMemConfig(enable_sleep_mode=True).maybe_use_memory_pool("kv", on_sleep="discard"):
        assert calls == [("kv", {"on_sleep": "discard"})]


# ---- bad values


@pytest.mark.parametrize("name", ["host_backup_limit", "host_driver_devices", "host_driver_bytes"])
@pytest.mark.parametrize("value", [0, -1, 1 << 63])
def test_numbers_out_of_range_are_value_errors_that_name_the_setting(name: str, value: int) -> None:
    with refuses(InvalidArgumentError, names=f"{name}={value} "):
        CuMemConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["host_backup_limit", "host_driver_devices", "host_driver_bytes"])
@pytest.mark.parametrize("value", [True, 1.0, "16GiB", [1]])
def test_numbers_of_the_wrong_type_are_type_and_value_errors(name: str, value: object) -> None:
    with refuses(InvalidTypeError, names=(f"{name}=", type(value).__name__, "int")):
        CuMemConfig(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["enable_sleep_mode", "enable_cumem_allocator", "retain_backups"])
@pytest.mark.parametrize("value", [1, 0, "true"])
def test_switches_take_bools_only(name: str, value: object) -> None:
    with refuses(InvalidTypeError, names=(f"{name}=", "bool")):
        CuMemConfig(**{name: value})  # type: ignore[arg-type]


def test_sleep_mode_none_and_device_count_none_are_wrong_types() -> None:
    for name in ("enable_sleep_mode", "driver", "host_driver_devices", "host_driver_bytes"):
        with refuses(InvalidTypeError, names=name):
            CuMemConfig(**{name: None})  # type: ignore[arg-type]


@pytest.mark.parametrize("driver", ["", "CUDA", "gpu"])
def test_an_unknown_driver_is_an_error_that_lists_the_known_ones(driver: str) -> None:
    with refuses(InvalidArgumentError, names=(f"driver={driver!r}", "cuda, host")):
        CuMemConfig(driver=driver)  # type: ignore[arg-type]


def test_more_simulated_devices_than_the_host_driver_takes() -> None:
    assert CuMemConfig(host_driver_devices=64).host_driver_devices == 64
    with refuses(InvalidArgumentError, names=("host_driver_devices=65", "1 to 64")):
        CuMemConfig(host_driver_devices=65)


# ---- what takes the overflow


@pytest.mark.parametrize("text", ["pageable", "file:/tmp/backups"])
def test_an_overflow_is_a_backup_or_its_text(text: str) -> None:
    config = CuMemConfig(host_backup_overflow=text)  # type: ignore[arg-type]
    assert config == CuMemConfig(host_backup_overflow=Backup.parse(text))
    assert config.host_backup_overflow == Backup.parse(text)
    assert {config: 1}[pickle.loads(pickle.dumps(config))] == 1


@pytest.mark.parametrize("backup", [Backup.pinned(), Backup.peer(1), "pinned", "peer:1"], ids=str)
def test_only_pageable_memory_and_files_take_an_overflow(backup: Any) -> None:
    with refuses(
        InvalidArgumentError, names=(f"host_backup_overflow='{backup}'", "file:DIRECTORY")
    ):
        CuMemConfig(host_backup_overflow=backup)
    with refuses(InvalidArgumentError, names=("CUMEMPOOL_HOST_BACKUP_OVERFLOW", "file:DIRECTORY")):
        CuMemConfig.from_env({"CUMEMPOOL_HOST_BACKUP_OVERFLOW": str(backup)})


def test_an_overflow_of_the_wrong_type_or_form() -> None:
    for value in (1, True, b"pageable", ["pageable"]):
        with refuses(InvalidTypeError, names="host_backup_overflow"):
            CuMemConfig(host_backup_overflow=value)  # type: ignore[arg-type]
    for text in ("", "file:", "disk", "Pageable"):
        with refuses(InvalidArgumentError, names=("host_backup_overflow", "file:DIRECTORY")):
            CuMemConfig(host_backup_overflow=text)  # type: ignore[arg-type]


# ---- the driver


def test_the_environment_decides_the_driver_where_no_keyword_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "host")
    assert CuMemConfig().driver == "host"
    assert parse().driver == "host"
    assert CuMemConfig(driver="cuda").driver == "cuda"
    assert parse("--cumem-driver", "cuda").driver == "cuda"
    assert CuMemConfig.from_env({}).driver == "cuda"


def test_a_bad_driver_in_the_environment_is_an_error_unless_overruled(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "gpu")
    with refuses(InvalidArgumentError, names=("CUMEMPOOL_DRIVER: 'gpu'", "cuda, host")):
        CuMemConfig()
    assert CuMemConfig(driver="host").driver == "host"


# ---- numbers of bytes


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("4096", 4096),
        ("16GiB", 16 * GIB),
        ("512 MiB", 512 << 20),
        (" 10gb ", 10**10),
        ("1KB", 1000),
        ("1kib", 1024),
        ("2TiB", 2 << 40),
        ("3TB", 3 * 10**12),
        ("7B", 7),
        ("+1.5GiB", 3 * GIB // 2),
        ("16G", 16 * GIB),
        ("512m", 512 << 20),
        ("1 K", 1024),
        ("2T", 2 << 40),
    ],
)
def test_parse_bytes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "16 gigs", "16P", "1e9", "1.5.2GiB", "0x10", "1_000"])
def test_parse_bytes_says_which_units_there_are(text: str) -> None:
    with refuses(InvalidArgumentError, names="KiB, MiB, GiB, TiB, KB, MB, GB, TB"):
        parse_bytes(text)


@pytest.mark.parametrize("text", ["0", "-1", "-16GiB", "0GiB", "9000000TiB"])
def test_parse_bytes_takes_no_budget_out_of_range(text: str) -> None:
    with refuses(InvalidArgumentError, names=(repr(text), "out of range")):
        parse_bytes(text)


def test_parse_bytes_takes_no_part_of_a_byte() -> None:
    with refuses(InvalidArgumentError, names=("'0.5'", "whole")):
        parse_bytes("0.5")


# ---- environment


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1", True),
        ("true", True),
        ("YES", True),
        ("On", True),
        ("0", False),
        ("False", False),
        ("no", False),
        ("OFF", False),
    ],
)
def test_switches_in_the_environment(text: str, value: bool) -> None:
    assert CuMemConfig.from_env({"CUMEMPOOL_ENABLE_SLEEP_MODE": text}).enable_sleep_mode is value


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("CUMEMPOOL_ENABLE_SLEEP_MODE", "maybe", "1, true, yes, on, 0, false, no, off"),
        ("CUMEMPOOL_ENABLE_CUMEM_ALLOCATOR", "2", "1, true, yes, on, 0, false, no, off"),
        ("CUMEMPOOL_DRIVER", "rocm", "cuda, host"),
        ("CUMEMPOOL_HOST_BACKUP_LIMIT", "lots", "KiB, MiB"),
        ("CUMEMPOOL_HOST_BACKUP_LIMIT", "-1GiB", "must be 1 to"),
        ("CUMEMPOOL_HOST_BACKUP_OVERFLOW", "disk", "file:DIRECTORY"),
        ("CUMEMPOOL_RETAIN_BACKUPS", "perhaps", "1, true, yes, on, 0, false, no, off"),
        ("CUMEMPOOL_HOST_DRIVER_DEVICES", "two", "not an integer"),
        ("CUMEMPOOL_HOST_DRIVER_DEVICES", "0", "must be 1 to 64"),
        ("CUMEMPOOL_HOST_DRIVER_BYTES", "8X", "KiB, MiB"),
    ],
)
def test_bad_values_in_the_environment_name_the_variable_and_what_is_allowed(
    name: str, text: str, allowed: str
) -> None:
    with refuses(InvalidArgumentError, names=(name, repr(text), allowed)):
        CuMemConfig.from_env({name: text})


def test_an_unknown_variable_stops_nobody_and_is_warned_of_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(config_module, "_logged", set())
    environ = {"CUMEMPOOL_ENABLE_SLEEPMODE": "1", "PATH": "/bin", "CUMEM": "x"}
    for _ in range(2):
        assert CuMemConfig.from_env(environ) == CuMemConfig()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("cumempool", "WARNING")
    assert "CUMEMPOOL_ENABLE_SLEEPMODE has no effect" in caplog.text
    for setting in SETTINGS:
        assert setting.env in caplog.text


@pytest.mark.parametrize("empty", ["", " "])
@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_an_empty_variable_is_not_set(
    setting: Setting, empty: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert CuMemConfig.from_env({setting.env: empty}) == CuMemConfig()
    monkeypatch.setenv(setting.env, empty)
    assert CuMemConfig() == CuMemConfig(driver="cuda")
    assert parse() == CuMemConfig()


def test_from_env_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMEMPOOL_HOST_BACKUP_LIMIT", "1GiB")
    assert CuMemConfig.from_env().host_backup_limit == GIB


# ---- command line


def test_flags_not_given_leave_the_defaults() -> None:
    assert parse() == CuMemConfig()


def test_no_forms_of_the_switches() -> None:
    assert parse("--no-enable-cumem-allocator").enable_cumem_allocator is False
    assert parse("--enable-cumem-allocator").enable_cumem_allocator is True
    assert parse("--no-enable-sleep-mode").enable_sleep_mode is False
    assert parse("--no-cumem-retain-backups").retain_backups is False
    assert parse("--cumem-retain-backups").retain_backups is True


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--cumem-driver", "rocm"], "cuda, host"),
        (["--cumem-host-backup-limit", "0"], "out of range"),
        (["--cumem-host-driver-bytes", "many"], "GiB"),
        (["--cumem-host-backup-overflow", "pinned"], "pageable or file:DIRECTORY"),
    ],
)
def test_bad_flags_end_with_usage_and_the_reason(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*arguments)
    message = capsys.readouterr().err
    assert arguments[0] in message
    assert text in message


def test_a_flag_counts_before_its_variable_and_that_before_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CUMEMPOOL_RETAIN_BACKUPS", "0")
    monkeypatch.setenv("CUMEMPOOL_HOST_BACKUP_LIMIT", "1G")
    assert parse().retain_backups is False
    assert parse().host_backup_limit == GIB
    assert parse("--cumem-retain-backups").retain_backups is True
    assert parse("--cumem-host-backup-limit", "2G").host_backup_limit == 2 * GIB
    parsed = CuMemConfig.add_cli_args(argparse.ArgumentParser()).parse_args([])
    assert CuMemConfig.from_cli_args(parsed, environ={}) == CuMemConfig()


def test_beside_a_parser_with_a_flag_of_the_same_name_a_prefix_is_needed() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--enable-sleep-mode", action="store_true")
    before = parser.format_help()
    with refuses(InvalidArgumentError, names=("--enable-sleep-mode", "prefix='cumem-'")):
        CuMemConfig.add_cli_args(parser)
    assert parser.format_help() == before
    CuMemConfig.add_cli_args(parser, prefix="cumem-")
    arguments = ["--enable-sleep-mode", "--cumem-driver", "host", "--cumem-retain-backups"]
    namespace = parser.parse_args(arguments)
    config = CuMemConfig.from_cli_args(namespace, prefix="cumem-")
    assert (config.enable_sleep_mode, config.driver) == (False, "host")
    namespace = parser.parse_args(["--cumem-enable-sleep-mode"])
    assert CuMemConfig.from_cli_args(namespace, prefix="cumem-").enable_sleep_mode
    assert parse("--pool-driver", "host", prefix="pool-").driver == "host"


def test_a_namespace_of_another_parser_is_refused() -> None:
    with refuses(InvalidArgumentError, names="CuMemConfig.add_cli_args(parser)"):
        CuMemConfig.from_cli_args(argparse.Namespace())


def test_help_shows_every_setting() -> None:
    text = CuMemConfig.add_cli_args(argparse.ArgumentParser()).format_help()
    for setting in SETTINGS:
        assert setting.flag in text
        assert setting.doc in " ".join(text.split())


# ---- one table behind all of them


def test_the_table_has_every_field_once() -> None:
    fields = [field.name for field in dataclasses.fields(CuMemConfig)]
    assert [setting.name for setting in SETTINGS] == fields
    assert len({setting.env for setting in SETTINGS}) == len(SETTINGS)
    assert len({setting.flag for setting in SETTINGS}) == len(SETTINGS)
    for setting in SETTINGS:
        assert f"{setting.name}:" in (inspect.getdoc(CuMemConfig) or "")
        for name in (setting.name, setting.env, setting.flag):
            assert f"`{name}`" in settings_table()


@pytest.mark.parametrize(
    ("keywords", "arguments", "environ"),
    [
        ({}, [], {}),
        (
            {"enable_sleep_mode": True},
            ["--enable-sleep-mode"],
            {"CUMEMPOOL_ENABLE_SLEEP_MODE": "on"},
        ),
        (
            {
                "enable_sleep_mode": False,
                "enable_cumem_allocator": True,
                "driver": "host",
                "host_backup_limit": 3 * GIB // 2,
                "host_backup_overflow": Backup.file("/tmp/overflow"),
                "retain_backups": False,
                "host_driver_devices": 2,
                "host_driver_bytes": 10**10,
            },
            [
                "--no-enable-sleep-mode",
                "--enable-cumem-allocator",
                "--cumem-driver=host",
                "--cumem-host-backup-limit=1.5GiB",
                "--cumem-host-backup-overflow=file:/tmp/overflow",
                "--no-cumem-retain-backups",
                "--cumem-host-driver-devices=2",
                "--cumem-host-driver-bytes=10GB",
            ],
            {
                "CUMEMPOOL_ENABLE_SLEEP_MODE": "no",
                "CUMEMPOOL_ENABLE_CUMEM_ALLOCATOR": "true",
                "CUMEMPOOL_DRIVER": "host",
                "CUMEMPOOL_HOST_BACKUP_LIMIT": "1536MiB",
                "CUMEMPOOL_HOST_BACKUP_OVERFLOW": "file:/tmp/overflow",
                "CUMEMPOOL_RETAIN_BACKUPS": "no",
                "CUMEMPOOL_HOST_DRIVER_DEVICES": "2",
                "CUMEMPOOL_HOST_DRIVER_BYTES": "10000000000",
            },
        ),
    ],
)
def test_keywords_command_line_and_environment_give_the_same_object(
    keywords: dict[str, Any], arguments: list[str], environ: dict[str, str]
) -> None:
    config = CuMemConfig(**keywords)
    assert parse(*arguments) == config
    assert CuMemConfig.from_env(environ) == config
