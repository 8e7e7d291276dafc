"""Exceptions: one class per status, caught by the built-in class that fits, nothing lost (R12)."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest

import cumempool.errors as errors
from cumempool.errors import ERROR_BY_STATUS, CumempoolError, error_from_fields

ROOT = Path(__file__).resolve().parents[2]

FIELDS: dict[str, object] = {
    "status": 3,
    "message": "wake of tag 'kv' on device 1: no room",
    "operation": "wake",
    "tag": "kv",
    "device": 1,
    "bytes": 2 << 20,
    "driver_call": "cuMemCreate",
    "result": 2,
    "result_name": "CUDA_ERROR_OUT_OF_MEMORY",
    "free_bytes": 1 << 20,
    "total_bytes": 1 << 30,
    "advice": "free memory on device 1",
    "secondary": ["cuMemUnmap returned CUDA_ERROR_INVALID_VALUE"],
}

EVERY_CLASS = [
    cls
    for cls in vars(errors).values()
    if isinstance(cls, type) and issubclass(cls, CumempoolError)
]


def statuses_of_header() -> dict[str, int]:
    text = (ROOT / "include" / "cumempool" / "status.h").read_text(encoding="utf-8")
    body = re.search(r"typedef enum cumempool_status \{(.*?)\}", text, re.DOTALL)
    assert body is not None
    found = re.findall(r"CUMEMPOOL_(\w+) = (\d+)", body[1])
    return {name: int(number) for name, number in found}


def test_every_status_of_the_header_has_a_class() -> None:
    statuses = statuses_of_header()
    assert statuses.pop("OK") == 0
    assert sorted(ERROR_BY_STATUS) == sorted(statuses.values())
    assert len(set(ERROR_BY_STATUS.values())) == len(statuses)


def test_each_status_name_goes_to_the_class_that_means_it() -> None:
    renamed = {
        "NOT_OWNED": "NotInPoolError",
        "BUSY": "TransitionInProgressError",
        "CAPTURING": "StreamCaptureError",
        "DRIVER_ERROR": "DriverError",
        "BACKUP_FAILED": "BackupError",
    }
    for name, number in statuses_of_header().items():
        if name != "OK":
            words = "".join(word.capitalize() for word in name.split("_"))
            assert ERROR_BY_STATUS[number].__name__ == renamed.get(name, f"{words}Error")


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("InvalidArgumentError", ValueError),
        ("InvalidTypeError", ValueError),
        ("InvalidTypeError", TypeError),
        ("UnavailableError", RuntimeError),
        ("OutOfMemoryError", RuntimeError),
        ("OutOfHostMemoryError", MemoryError),
        ("UnknownTagError", KeyError),
        ("NotInPoolError", ValueError),
        ("SharingError", RuntimeError),
        ("TransitionInProgressError", RuntimeError),
        ("StreamCaptureError", RuntimeError),
        ("InUseError", RuntimeError),
        ("ClosedError", RuntimeError),
        ("ForkedError", RuntimeError),
        ("OutOfSlotsError", RuntimeError),
        ("DriverError", RuntimeError),
        ("InternalError", RuntimeError),
        ("BackupError", RuntimeError),
        ("BackupDamagedError", RuntimeError),
        ("BackupDamagedError", errors.BackupError),
        ("UnsupportedError", RuntimeError),
    ],
)
def test_can_be_caught_as_the_builtin_class(name: str, builtin: type[Exception]) -> None:
    with pytest.raises(builtin):
        raise getattr(errors, name)("text")


def test_all_fields_arrive() -> None:
    error = error_from_fields(FIELDS)
    assert type(error) is errors.OutOfMemoryError
    assert str(error) == FIELDS["message"]
    assert vars(error) == {
        "operation": "wake",
        "tag": "kv",
        "device": 1,
        "bytes": 2 << 20,
        "driver_call": "cuMemCreate",
        "result": 2,
        "result_name": "CUDA_ERROR_OUT_OF_MEMORY",
        "free_bytes": 1 << 20,
        "total_bytes": 1 << 30,
        "advice": "free memory on device 1",
        "secondary": ("cuMemUnmap returned CUDA_ERROR_INVALID_VALUE",),
    }


def test_what_does_not_apply_is_none() -> None:
    error = error_from_fields({"status": 10, "message": "closed", "tag": "", "device": -1})
    assert type(error) is errors.ClosedError
    assert (error.tag, error.device, error.free_bytes, error.total_bytes) == (None,) * 4
    assert (error.bytes, error.result, error.secondary) == (0, 0, ())


def test_a_full_device_has_zero_free_bytes_and_not_none() -> None:
    error = error_from_fields({**FIELDS, "free_bytes": 0})
    assert (error.free_bytes, error.total_bytes) == (0, 1 << 30)


@pytest.mark.parametrize("status", [0, 99, -1])
def test_a_status_without_a_class_is_an_internal_error(status: int) -> None:
    error = error_from_fields({**FIELDS, "status": status})
    assert type(error) is errors.InternalError
    assert str(error) == FIELDS["message"]
    assert str(status) in str(error_from_fields({"status": status}))


@pytest.mark.parametrize(
    ("name", "value"),
    [("message", b"x"), ("bytes", "2"), ("secondary", "text"), ("secondary", [1])],
)
def test_a_field_of_the_wrong_type_is_named(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=name):
        error_from_fields({**FIELDS, name: value})


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_survives_pickling_and_copying(cls: type[CumempoolError]) -> None:
    error = cls("text", tag="kv", device=0, bytes=7, free_bytes=0, secondary=("a", "b"))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error), copy.deepcopy(error)):
        assert type(again) is cls
        assert str(again) == "text"
        assert vars(again) == vars(error)


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_str_is_the_plain_message(cls: type[CumempoolError]) -> None:
    assert str(cls("unknown tag 'a'")) == "unknown tag 'a'"
    assert str(cls()) == ""


@pytest.mark.parametrize("cls", EVERY_CLASS)
def test_every_class_says_when_it_is_raised_and_is_exported(cls: type[CumempoolError]) -> None:
    assert len(vars(cls).get("__doc__") or "") > 30
    assert cls.__name__ in errors.__all__
