"""Runs the code blocks of one page of documentation, in order, as its reader would.

python tests/pages.py PAGE [--gpu] [--check]

What a block is, its first line says: ```python and ```sh run; with `gpu` behind it, on a GPU only;
with title="NAME", it is written to that file instead. needs="PACKAGE" leaves it out on a GPU
machine that has no such package. ```text is shown to people only. Blocks of a page share their
names and one empty folder. Code in a comment `<!-- given ... -->` runs in its place and is not
shown; ROOT is the repository there. Without --gpu all runs on the host driver, and "cuda" as a
device means the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import stat
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(
    r"^(?:```(?P<language>\w*)(?P<info>[^\n]*)\n(?P<code>.*?)^```"
    r"|<!-- given(?P<marks>[^\n]*)\n(?P<given>.*?)^-->)$",
    re.MULTILINE | re.DOTALL,
)
#: Beginnings of lines for the shell that are not run here, and why that is so.
NOT_RUN = {
    "pip install ": "continuous integration runs the README's",
    "vllm serve ": "not a dependency",
    "VLLM_PLUGINS=": "as above",
    "PYTHONPATH=": "for a server that is not a dependency",
    "python -m sglang": "as above",
    "python examples/": "tests/python/test_examples.py runs them; see `check_example`",
    "mkdocs build ": "continuous integration does",
}


@dataclass(frozen=True)
class Block:
    """One block of code. `line` is that of its first line of code in the page."""

    language: str
    code: str
    line: int
    gpu: bool
    title: str = ""
    needs: str = ""


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page.

    Raises:
        ValueError: A fence that is none of those above.
    """
    found = []
    for match in BLOCK.finditer(text):
        given = match["given"] is not None
        marks = dict(
            mark.partition("=")[::2]
            for mark in shlex.split((match["marks"] if given else match["info"]) or "")
        )
        language = "python" if given else match["language"] or "text"
        code = match["given"] if given else match["code"]
        line = text.count("\n", 0, match.start("given" if given else "code")) + 1
        if language not in ("python", "sh", "text") or set(marks) - {"gpu", "title", "needs"}:
            raise ValueError(f"line {line - 1}: ```{language} {' '.join(marks)} is not known")
        gpu, title, needs = "gpu" in marks, marks.get("title", ""), marks.get("needs", "")
        found.append(Block(language, code, line, gpu, title, needs))
    fences = len(re.findall(r"^\s*(?:```|~~~|<!-- given)", text, re.MULTILINE))
    expected = sum(1 if match["given"] is not None else 2 for match in BLOCK.finditer(text))
    if fences != expected:
        raise ValueError(f"{fences} fences, of which {expected} begin or end a block")
    return found


# ---- checks without running


def check_command(line: str) -> None:
    """Fails where the command line tool would not take a line's arguments."""
    import click

    from cumempool.tools.cli import main

    words = shlex.split(line.partition(" > ")[0].partition(" | ")[0])
    words = words[words.index("cumempool") + 1 :]
    with main.make_context("cumempool", list(words), resilient_parsing=False) as context:
        name, command, rest = main.resolve_command(context, words)
        assert command is not None
        try:
            command.make_context(name, rest, parent=context)
        except click.BadParameter as error:
            if "does not exist" not in str(error):  # a file that the reader has
                raise


def check_example(line: str) -> None:
    """Fails where an example is missing, or an option is nowhere in it."""
    script, *words = [word for word in shlex.split(line, comments=True) if word != "python"]
    source = (ROOT / script).read_text(encoding="utf-8")
    options = [word.removeprefix("--").replace("-", "_") for word in words if word[:2] == "--"]
    missing = [name for name in options if not re.search(rf"\b{name}\b", source)]
    assert not missing, f"{script} has no {missing}"


def check(block: Block) -> None:
    """What can be said of a block where it is not run."""
    if block.language == "python":
        compile(block.code, "block", "exec")
        return
    lines = block.code.replace("\\\n", " ").splitlines()
    if len({line.startswith(tuple(NOT_RUN)) for line in lines}) > 1:
        raise ValueError(f"line {block.line}: some of it would not be run, split the block")
    for line in lines:
        if line.startswith("python examples/"):
            check_example(line)
        elif line.startswith(("cumempool ", "python -m cumempool ")):
            check_command(line)


def is_run(block: Block, gpu: bool) -> bool:
    if gpu and block.needs and importlib.util.find_spec(block.needs) is None:
        print(f"line {block.line}: not run, since {block.needs} is not installed")
        return False
    if block.language == "sh":
        return not block.code.startswith(tuple(NOT_RUN)) and (gpu or not block.gpu)
    return block.language == "python" and (gpu or not block.gpu)


# ---- running


def run_python(block: Block, page: Path, names: dict[str, Any], gpu: bool) -> None:
    code = block.code if gpu else block.code.replace('device="cuda"', 'device="cpu"')
    if block.title:
        Path(block.title).write_text(code, encoding="utf-8")
        return
    exec(compile("\n" * (block.line - 1) + code, str(page), "exec"), names)


def run_shell(block: Block, page: Path) -> None:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], check=False, timeout=240)
    if done.returncode:
        sys.exit(f"{page}:{block.line}: exit status {done.returncode}\n{block.code}")


def set_up(folder: Path, gpu: bool) -> None:
    """The reader's surroundings: an empty folder, and the commands of this interpreter."""
    strict = "" if gpu else "-W error"  # what torch on a GPU machine imports may warn of itself
    for name, arguments in {"python": "", "cumempool": "-m cumempool"}.items():
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        command = f"{shlex.quote(sys.executable)} {strict} {arguments}"
        path.write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    for name in [name for name in os.environ if name.startswith("CUMEMPOOL_")]:
        del os.environ[name]
    runtime = folder / "runtime"
    runtime.mkdir()
    os.environ |= {
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "XDG_RUNTIME_DIR": str(runtime),
        "COLUMNS": "100",
    }
    if not gpu:
        os.environ |= {"CUMEMPOOL_DRIVER": "host", "CUMEMPOOL_HOST_DRIVER_BYTES": "1GiB"}
    work = folder / "work"
    work.mkdir()
    os.chdir(work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path)
    parser.add_argument("--gpu", action="store_true", help="on the cuda driver, all blocks")
    parser.add_argument("--check", action="store_true", help="run nothing: look at each block")
    arguments = parser.parse_args()
    page = arguments.page.resolve()
    blocks = blocks_of(page.read_text(encoding="utf-8"))
    if arguments.check:
        for block in blocks:
            check(block)
        return
    if not arguments.gpu:
        from cumempool import UnroutedWarning

        # The pages are about the cuda driver; on host their scopes route nothing.
        warnings.simplefilter("ignore", UnroutedWarning)
    names: dict[str, Any] = {"__name__": "__main__", "ROOT": ROOT}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        set_up(Path(folder), arguments.gpu)
        for block in blocks:
            if not is_run(block, arguments.gpu):
                continue
            if block.language == "python":
                run_python(block, page, names, arguments.gpu)
            else:
                run_shell(block, page)
        os.chdir(ROOT)


if __name__ == "__main__":
    main()
