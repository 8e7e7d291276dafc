"""The documentation is true: examples run, links and paths lead somewhere, names exist."""

from __future__ import annotations

import builtins
import re
import shlex
from pathlib import Path

import pytest
from conftest import RunPython

import cumempool
from cumempool.config import SETTINGS, settings_table

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DESIGN = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
IDS = [page.relative_to(ROOT).as_posix() for page in PAGES]
FOLDERS = "benchmarks|cmake|cpp|docs|examples|include|scripts|src|tests"


def code_blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.+)$", text, re.MULTILINE)


def test_readme_has_its_sections_in_order() -> None:
    assert headings(README) == [
        "What it guarantees, and what not",
        "Support matrix",
        "Install",
        "Diagnose",
        "How it works",
        "Measured numbers",
    ]


def test_readme_sets_up_with_two_commands() -> None:
    lines = [line for block in code_blocks(README, "sh") for line in block.splitlines()]
    assert [line for line in lines if line.startswith("pip ")] == [
        "pip install -c constraints.txt . && python -m cumempool demo",
        "pip install -c constraints.txt '.[test]' && pytest",
    ]


def test_readme_example_is_ten_lines_and_runs(run_python: RunPython) -> None:
    (example,) = code_blocks(README, "python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 10
    done = run_python(example.replace('device="cuda"', 'device="cpu"'))
    assert (done.code, done.err) == (0, "")
    slept, woken = re.findall(r"^(sleep|wake_up):", done.out, re.MULTILINE)
    assert (slept, woken) == ("sleep", "wake_up")
    assert "override" not in done.out


def test_readme_diagnosis_runs(run_python: RunPython) -> None:
    (line,) = [b for b in code_blocks(README, "sh") if b.startswith("python -c")]
    program, option, code = shlex.split(line)
    assert (program, option) == ("python", "-c")
    done = run_python(code)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Availability(ok=True, reason=''")


def test_configuration_page_has_the_table_of_the_code() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert settings_table() in page
    assert [s.name for s in SETTINGS if f"`{s.name}`" not in page] == []


def test_design_page_explains_every_rule_once_and_in_order() -> None:
    rules = re.findall(r"^- \*\*R(\d+)\*\*", DESIGN, re.MULTILINE)
    assert rules == [str(number) for number in range(1, 16)]


def test_changelog_has_this_version() -> None:
    changes = headings((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))
    version = cumempool.__version__
    assert any(heading.startswith(f"[{version}]") for heading in changes)


def test_every_decision_is_numbered_and_listed() -> None:
    pages = sorted((ROOT / "docs" / "adr").glob("[0-9]*.md"))
    numbers = [int(page.name[:4]) for page in pages]
    assert numbers == list(range(1, len(pages) + 1))
    titles = [page.read_text(encoding="utf-8").splitlines()[0].removeprefix("# ") for page in pages]
    assert [int(title.partition(".")[0]) for title in titles] == numbers
    index = (ROOT / "docs" / "adr" / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^- \[(.+)\]\((.+)\)$", index, re.MULTILINE)
    assert listed == list(zip(titles, [page.name for page in pages], strict=True))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)\s#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    local = [target for target in targets if not target.startswith("https://")]
    assert [target for target in local if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_paths_that_are_named_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(rf"`((?:{FOLDERS})/[\w./*-]*)`", text)
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


def missing_tests(text: str) -> list[str]:
    """Of the tests that a text names as `tests/file::test`, those that are not in the file."""
    missing = []
    for path, name in re.findall(r"`(tests/[\w./]+)::(\w+)`", text):
        source = (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else ""
        if not re.search(rf"^def {name}\(|^(?:TEST\w*|TYPED_TEST)\(\w+,\s*{name}\)", source, re.M):
            missing.append(f"{path}::{name}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_tests_that_are_named_exist(page: Path) -> None:
    assert missing_tests(page.read_text(encoding="utf-8")) == []


def test_a_test_that_is_named_and_missing_is_caught() -> None:
    here = "tests/python/test_docs.py"
    assert missing_tests(f"`{here}::test_every_rule_has_tests_and_limits`") == []
    named = [f"{here}::test_of_nothing", "tests/cpp/no_test.cpp::Nothing"]
    assert missing_tests("".join(f"`{name}`" for name in named)) == named


def test_every_rule_has_tests_and_limits() -> None:
    page = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")
    sections = re.split(r"^## R(\d+): .*$", page, flags=re.MULTILINE)[1:]
    assert sections[::2] == [str(number) for number in range(1, 16)]
    for section in sections[1::2]:
        assert re.search(r"^Enforced by: ", section, re.MULTILINE)
        assert re.search(r"`tests/\S+::\w+`", section)
    for section in sections[1::2]:
        assert re.search(r"^Not promised(?:: |, besides: )", section, re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_exceptions_that_are_named_exist(page: Path) -> None:
    named = set(re.findall(r"`(?:cumempool\.)?(\w+Error)`", page.read_text(encoding="utf-8")))
    known = {*cumempool.__all__, *dir(builtins)}
    assert sorted(named - known) == []


def test_allocator_methods_that_the_readme_calls_exist() -> None:
    called = set(re.findall(r"\balloc\.(\w+)", README))
    assert called
    assert [name for name in called if not hasattr(cumempool.CuMemAllocator, name)] == []
