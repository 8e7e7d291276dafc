"""Turns the results of gpu_check.sh into a JSON record and its closing line."""

from __future__ import annotations

import argparse
import json
import re
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import torch

import cumempool

ROOT = Path(__file__).resolve().parent.parent
LARGEST_MALLOC_RATIO = 1.2
# Conformance tests that prove nothing on a machine with one GPU.
NEED_TWO_DEVICES = (
    "C3_ContextEntriesFailInsideAnotherDevicesContext",
    "C9_DevicesWithAccessCopyAndWaitAcross",
    "C9_UnregisteringWaitsForTheCopiesOfAnotherDevice",
    "C10_ADeviceThatNobodyUsesCostsTheFenceNothing",
    "C10_FenceWaitsForEachOfTheListedDevices",
    "DeallocateTakesNoMemoryOfAnotherDevice",
)


def read_steps(path: Path) -> list[dict[str, object]]:
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return [{"name": n, "passed": code == "0", "seconds": int(s)} for n, code, s in rows]


def read_not_run(path: Path) -> dict[str, str]:
    """Returns the files of tests, examples and steps that were left out, with the reasons."""
    rows = (line.split("\t") for line in path.read_text().splitlines())
    return dict(rows)


def read_pytest(folder: Path, not_run: dict[str, str]) -> dict[str, object]:
    """Counts the tests of every file; a file whose process wrote nothing is one failure.

    Keeps the figures of tests under their names. Tests that are expected to fail here, such as
    tests for two GPUs on a machine with one, go to `not_run` with their reason.
    """
    passed, failures = 0, []
    figures: dict[str, dict[str, object]] = {}
    for source in sorted((ROOT / "tests" / "gpu").glob("test_*.py")):
        if source.stem in not_run:
            continue
        result = folder / f"{source.stem}.xml"
        if not result.exists():
            failures.append(f"{source.name} wrote no result")
            continue
        for case in ElementTree.parse(result).iter("testcase"):
            skipped = case.find("skipped")
            if skipped is not None and skipped.get("type") == "pytest.xfail":
                not_run[f"{case.get('classname')}.{case.get('name')}"] = skipped.get("message", "")
                continue
            bad = any(case.find(kind) is not None for kind in ("failure", "error", "skipped"))
            if bad:
                failures.append(f"{case.get('classname')}.{case.get('name')}")
            passed += not bad
            found = {each.get("name", ""): each.get("value", "") for each in case.iter("property")}
            if found:
                figures[f"{case.get('classname')}.{case.get('name')}"] = dict(found)
    return {"passed": passed, "failed": len(failures), "failures": failures, "figures": figures}


def read_conformance(path: Path, device_count: int, not_run: dict[str, str]) -> dict[str, object]:
    if "conformance" in not_run:
        return {"passed": 0, "failed": 0, "failures": []}
    if not path.exists():
        return {"passed": 0, "failed": 1, "failures": ["the conformance suite wrote no result"]}
    suites = json.loads(path.read_text())["testsuites"]
    tests = [
        test
        for suite in suites
        for test in suite["testsuite"]
        if device_count > 1 or test["name"].partition("/")[0] not in NEED_TWO_DEVICES
    ]
    on_cuda = [test for test in tests if str(test["classname"]).startswith("Gpu/")]
    failures = [
        f"{test['classname']}.{test['name']}"
        for test in tests
        if test.get("failures") or test["result"] != "COMPLETED"
    ]
    if not on_cuda:
        failures.append("no conformance test ran on the cuda driver")
    return {
        "passed": len(tests) - len(failures),
        "failed": len(failures),
        "on_cuda": len(on_cuda),
        "failures": failures,
    }


def read_malloc_path(path: Path, not_run: dict[str, str]) -> dict[str, object]:
    if "malloc_path" in not_run:
        return {"failures": []}
    text = path.read_text() if path.exists() else ""
    start = text.find("{")
    if start < 0:
        return {"failures": ["malloc_path printed no result"]}
    result: dict[str, object] = json.loads(text[start:])
    sizes = result["sizes"]
    assert isinstance(sizes, list)
    result["failures"] = [
        f"malloc of {size['bytes']} bytes costs {size['malloc_ratio']} of the bare driver calls"
        for size in sizes
        if size["malloc_ratio"] > LARGEST_MALLOC_RATIO
    ]
    return result


def driver_release() -> str:
    """Returns the release of the kernel driver, such as ``580.159.04``; ``""`` if unknown."""
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"\d+\.\d+(\.\d+)?", path.read_text()) if path.exists() else None
    return found[0] if found else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--commit", required=True)
    for name in ("steps", "not-run", "pytest", "conformance", "malloc-path", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()

    probe = cumempool.probe(driver="cuda")
    steps = read_steps(arguments.steps)
    not_run = read_not_run(arguments.not_run)
    tests = read_pytest(arguments.pytest, not_run)
    conformance = read_conformance(arguments.conformance, len(probe.devices), not_run)
    malloc_path = read_malloc_path(arguments.malloc_path, not_run)
    record = {
        "commit": arguments.commit,
        "device": probe.devices[0].name if probe.devices else "",
        "device_count": len(probe.devices),
        "driver": driver_release(),
        "cuda_driver_version": probe.driver_version,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "probe": probe.to_dict(),
        "steps": steps,
        "gpu_tests": tests,
        "not_run": not_run,
        "conformance": conformance,
        "malloc_path": malloc_path,
    }
    arguments.output.write_text(json.dumps(record, indent=1, default=str) + "\n")
    # Steps with single results are not counted again as steps.
    single = [step for step in steps if step["name"] not in ("pytest", "conformance")]
    problems = malloc_path["failures"]
    assert isinstance(problems, list)
    for line in [*tests["failures"], *conformance["failures"], *problems]:  # type: ignore[misc]
        print(f"FAILED {line}")
    for name, reason in not_run.items():
        print(f"NOT RUN {name}: {reason}")
    passed = int(str(tests["passed"])) + int(str(conformance["passed"]))
    passed += sum(bool(step["passed"]) for step in single)
    failed = int(str(tests["failed"])) + int(str(conformance["failed"])) + len(problems)
    failed += sum(not step["passed"] for step in single)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
