"""Reports of transitions: rows of one tag add up exactly (R13), and rates are of copied bytes."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError

import pytest

from cumempool import TagReport, TransitionReport, format_bytes

GIB = 1 << 30


def row(tag: str, device: int = 0, **amounts: float) -> dict[str, object]:
    fields = {"allocations": 1, "freed_bytes": 0, "mapped_bytes": 0, "backed_up_bytes": 0}
    fields |= {"clean_bytes": 0, "restored_bytes": 0, "discarded_bytes": 0, "zeroed_bytes": 0}
    return {"tag": tag, "device": device, **fields, "copy_seconds": 0.0, **amounts}


def sleep_report() -> TransitionReport:
    rows = [
        row("weights", 1, freed_bytes=2 * GIB, backed_up_bytes=2 * GIB, copy_seconds=0.5)
        | {"clean_bytes": GIB},
        row("kv_cache", 0, allocations=3, freed_bytes=GIB, discarded_bytes=GIB),
        row("weights", 0, freed_bytes=4 * GIB, backed_up_bytes=3 * GIB, copy_seconds=0.25)
        | {"discarded_bytes": GIB},
    ]
    return TransitionReport.from_rows(
        "sleep", 1.0, rows, ["release failed"], {"kv_cache": "discarded, policy says offload"}
    )


def test_devices_of_a_tag_add_up() -> None:
    weights = sleep_report().tags["weights"]
    assert weights == TagReport(
        tag="weights",
        devices=(0, 1),
        allocations=2,
        bytes_freed=6 * GIB,
        bytes_backed_up=5 * GIB,
        bytes_clean=GIB,
        bytes_discarded=GIB,
        seconds=0.75,
    )
    assert weights.bytes_dirty == weights.bytes_copied == 4 * GIB


def test_totals_are_the_sums_over_tags() -> None:
    report = sleep_report()
    assert report.bytes_freed == 7 * GIB
    assert report.bytes_backed_up == 5 * GIB
    assert (report.bytes_clean, report.bytes_dirty) == (GIB, 4 * GIB)
    assert report.bytes_copied == 4 * GIB
    assert report.bytes_discarded == 2 * GIB
    assert (report.bytes_mapped, report.bytes_restored, report.bytes_zeroed) == (0, 0, 0)


def test_each_field_of_a_row_lands_in_its_own_field() -> None:
    amounts = {
        "allocations": 1,
        "freed_bytes": 2,
        "mapped_bytes": 3,
        "backed_up_bytes": 5,
        "clean_bytes": 4,
        "restored_bytes": 6,
        "discarded_bytes": 7,
        "zeroed_bytes": 8,
        "copy_seconds": 9.0,
    }
    tag = TransitionReport.from_rows("sleep", 1.0, [row("a", 9, **amounts)]).tags["a"]
    assert tag == TagReport("a", (9,), 1, 2, 3, 5, 4, 6, 7, 8, 9.0)
    assert (tag.bytes_dirty, tag.bytes_copied) == (1, 7)


def test_rates_are_decimal_gigabytes_of_copies_over_copy_seconds() -> None:
    report = sleep_report()
    assert report.tags["weights"].gb_per_s == pytest.approx(4 * GIB / 0.75 / 1e9)
    assert report.gb_per_s == pytest.approx(4 * GIB / 0.75 / 1e9)
    woken = TransitionReport.from_rows(
        "wake_up", 1.0, [row("a", restored_bytes=10**9, copy_seconds=0.5)]
    )
    assert woken.gb_per_s == pytest.approx(2.0)


def test_rate_is_zero_where_nothing_was_copied_or_no_time_was_measured() -> None:
    assert sleep_report().tags["kv_cache"].gb_per_s == 0.0
    assert TagReport("a", bytes_restored=1, seconds=0.0).gb_per_s == 0.0
    assert TransitionReport.from_rows("sleep", 0.0, []).gb_per_s == 0.0


def test_a_tag_without_devices_is_reported_empty() -> None:
    tag = TransitionReport.from_rows("sleep", 0.0, [row("a", -1, allocations=0)]).tags["a"]
    assert tag == TagReport("a")


def test_reports_are_immutable() -> None:
    report = sleep_report()
    with pytest.raises(FrozenInstanceError):
        report.seconds = 2.0  # type: ignore[misc]
    with pytest.raises(TypeError):
        report.tags["new"] = TagReport("new")  # type: ignore[index]
    with pytest.raises(TypeError):
        report.overrides["new"] = ""  # type: ignore[index]


def test_reports_do_not_follow_the_mappings_they_were_made_from() -> None:
    tags = {"a": TagReport("a")}
    report = TransitionReport("sleep", 0.0, tags, {}, ())
    tags["b"] = TagReport("b")
    assert list(report.tags) == ["a"]


def test_reports_can_be_pickled() -> None:
    report = sleep_report()
    assert pickle.loads(pickle.dumps(report)) == report


def test_to_dict_goes_through_json_unchanged() -> None:
    as_dict = sleep_report().to_dict()
    again = json.loads(json.dumps(as_dict))
    assert again == as_dict
    assert again["bytes_freed"] == 7 * GIB
    assert again["bytes_clean"] == again["tags"]["weights"]["bytes_clean"] == GIB
    assert again["tags"]["weights"]["devices"] == [0, 1]
    assert again["problems"] == ["release failed"]
    assert again["overrides"] == {"kv_cache": "discarded, policy says offload"}


def test_str_has_a_line_per_tag_override_and_problem() -> None:
    assert str(sleep_report()).splitlines() == [
        "sleep: freed 7.00 GiB, backed up 5.00 GiB, clean 1.00 GiB, discarded 2.00 GiB "
        "in 1000.0 ms",
        "  weights: 2 allocations on devices 0, 1, freed 6.00 GiB, backed up 5.00 GiB, "
        "clean 1.00 GiB, discarded 1.00 GiB, copies 750.0 ms at 5.7 GB/s",
        "  kv_cache: 3 allocations on device 0, freed 1.00 GiB, discarded 1.00 GiB",
        "  override, kv_cache: discarded, policy says offload",
        "  problem: release failed",
    ]
    empty = TransitionReport.from_rows("sleep", 0.0, [])
    assert str(empty) == "sleep: nothing changed in 0.0 ms"


def test_a_line_leaves_out_what_there_is_nothing_of() -> None:
    assert str(TagReport("a")) == "a: 0 allocations"
    assert str(TagReport("a", (2,), 1)) == "a: 1 allocation on device 2"
    assert str(TagReport("a", (), 1, bytes_freed=GIB)) == "a: 1 allocation, freed 1.00 GiB"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1.00 KiB"),
        (2 << 20, "2.00 MiB"),
        (16_063_275_991, "14.96 GiB"),
        (5000 << 40, "5000.00 TiB"),
    ],
)
def test_format_bytes(count: int, text: str) -> None:
    assert format_bytes(count) == text
