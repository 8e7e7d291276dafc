"""The documentation is true: examples run, links and paths lead somewhere, names exist."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest
from conftest import RunPython

import cumempool
from cumempool.config import SETTINGS, settings_table

pytestmark = pytest.mark.extensive

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
    shown = (
        "import cumempool, warnings\nwarnings.simplefilter('default', cumempool.UnroutedWarning)\n"
    )
    done = run_python(shown + example.replace('device="cuda"', 'device="cpu"'))
    assert done.code == 0, done.err
    assert done.err.count("UnroutedWarning: nothing was allocated from the pool") == 1
    slept, woken = re.findall(r"^(sleep|wake_up):", done.out, re.MULTILINE)
    assert (slept, woken) == ("sleep", "wake_up")
    assert "override" not in done.out


def test_readme_diagnosis_runs(run_python: RunPython) -> None:
    (line,) = [b for b in code_blocks(README, "sh") if b.startswith("python -c")]
    program, option, code = shlex.split(line)
    assert (program, option) == ("python", "-c")
    done = run_python(code)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("cumempool can be used: driver host")


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


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_allocator_methods_that_are_called_exist(page: Path) -> None:
    called = set(re.findall(r"\b(?:alloc|allocator)\.(\w+)\(", page.read_text(encoding="utf-8")))
    assert [name for name in called if not hasattr(cumempool.CuMemAllocator, name)] == []


# ---- code blocks


def load_runner() -> ModuleType:
    """``tests/pages.py``, which is in no package."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "tests" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["pages"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


RUNNER = load_runner()
#: Those that the documentation is made of; others are for developers.
READ = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: The blocks of the README are run above.
RUN = [
    page
    for page in READ[1:]
    if any(RUNNER.is_run(block, False) for block in RUNNER.blocks_of(page.read_text("utf-8")))
]


def relative(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def run_page(page: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", str(ROOT / "tests" / "pages.py"), str(page)],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )


def check_text(text: str) -> None:
    for block in RUNNER.blocks_of(text):
        RUNNER.check(block)


@pytest.mark.parametrize("page", READ, ids=relative)
def test_every_block_is_of_a_known_kind_and_can_be_read(page: Path) -> None:
    check_text(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", RUN, ids=relative)
def test_the_blocks_of_a_page_run_in_order(page: Path) -> None:
    done = run_page(page)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize(
    "text",
    [
        "```python\nassert 1 + 1 == 3\n```\n",
        "```python\nimport cumempool\n```\n\n```python\ncumempool.no_such_name\n```\n",
        "```sh\ncumempool no-such-command\n```\n",
        "```sh\ncumempool doctor --driver host | grep nonsense\n```\n",
        '```python\nimport warnings\nwarnings.warn("old", DeprecationWarning)\n```\n',
    ],
    ids=["a wrong value", "a missing name", "a missing command", "a failing pipe", "a warning"],
)
def test_a_broken_block_is_found(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    done = run_page(page)
    assert done.returncode != 0
    assert "page.md" in done.stderr


def test_blocks_share_names_and_a_folder_and_leave_none(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nimport os\nhere = os.getcwd()\n```\n"
        "<!-- given\nhidden = 3\n-->\n"
        '```python title="script.py"\nimport sys\nsys.exit(0 if sys.argv[1] == "3" else 1)\n```\n'
        "```python gpu\nraise SystemExit('ran without a GPU')\n```\n"
        "```sh\npython script.py 3\n```\n"
        "```python\nassert hidden == 3 and os.listdir() == ['script.py']\nprint(here)\n```\n",
        encoding="utf-8",
    )
    done = run_page(page)
    assert (done.returncode, done.stderr) == (0, "")
    assert not Path(done.stdout.strip()).exists()


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("```python3\n```\n", ValueError),
        ("```python gpu slow\n```\n", ValueError),
        ("- a list\n\n  ```python\n  indented\n  ```\n", ValueError),
        ("```python gpu\nin no language\n```\n", SyntaxError),
        ("```sh gpu\ncumempool doctor --no-such-option\n```\n", click.UsageError),
        ("```sh\npip install cumempool\ncumempool doctor\n```\n", ValueError),
        ("```sh\npython examples/no_such.py\n```\n", FileNotFoundError),
        ("```sh\npython examples/rlhf_loop.py --no-such-option\n```\n", AssertionError),
    ],
)
def test_what_is_not_run_is_looked_at(text: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        check_text(text)


# ---- pages that follow the code


def test_the_quick_start_has_the_two_commands_of_the_readme() -> None:
    page = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    lines = re.findall(r"^pip install .*$", README, re.MULTILINE)
    assert len(lines) == 2
    assert re.findall(r"^pip install .*$", page, re.MULTILINE)[:2] == lines


def named_in_reference() -> set[str]:
    page = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    return set(re.findall(r"^::: (\S+)$", page, re.MULTILINE))


def test_the_reference_has_every_public_name() -> None:
    covered = set()
    for name in named_in_reference():
        package, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(package), last, None)
        if found is None or inspect.ismodule(found):
            found = importlib.import_module(name)
            covered |= {id(getattr(found, each)) for each in found.__all__}
        covered.add(id(found))
    public = [name for name in cumempool.__all__ if not name.startswith("__")]
    assert [name for name in public if id(getattr(cumempool, name)) not in covered] == []


def source_text() -> str:
    """All code of the library, with texts that are written in pieces joined."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "cpp").rglob("*.cpp")]
    files += [ROOT / "cpp" / "abi" / "boundary.hpp"]
    text = "\n".join(path.read_text(encoding="utf-8") for path in files)
    return re.sub(r'"\s*\n\s*f?"', "", text)


#: Messages of others that people find here.
OTHERS = {
    "CUDA out of memory. Tried to allocate",
    "CUDA_ERROR_ILLEGAL_ADDRESS",
    "CUDA_ERROR_NOT_PERMITTED",
    "IBV_WC_REM_ACCESS_ERR",
    "expandable_segments",
    "Cannot re-initialize CUDA in forked subprocess",
}


def messages_of_troubleshooting() -> list[str]:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    return re.findall(r"^### `(.+)`$", page, re.MULTILINE)


def test_messages_in_troubleshooting_are_those_of_the_library() -> None:
    source = source_text()
    messages = messages_of_troubleshooting()
    assert len(messages) > 25
    gone = [
        message
        for message in messages
        if message not in OTHERS
        and any(part.strip() not in source for part in message.split("...") if part.strip())
    ]
    assert gone == []


def test_troubleshooting_has_every_check_of_doctor() -> None:
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    source = (ROOT / "src" / "cumempool" / "tools" / "doctor.py").read_text(encoding="utf-8")
    names = {name.split(":")[-1].strip() for name in re.findall(r'Check\(\s*f?"([^"]+)"', source)}
    names |= {re.split("[ {]", name)[0] for name in re.findall(r'name = f?"([^"{]+)', source)}
    assert len(names) > 12
    assert sorted(name for name in names if f"| `{name}" not in page) == []
