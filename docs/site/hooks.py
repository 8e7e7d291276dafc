"""Lets links that leave docs/ lead somewhere in the site too, and keeps the network out of it."""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: Pages outside of docs/ that the navigation has.
OUTSIDE = ("SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(?<=\]\()(?!https?://|#|mailto:)([^)\s#]+)")
#: Code that only the tests of a page run, and what they read in fences; see tests/pages.py.
HIDDEN = re.compile(r"^<!-- given(?: gpu)?\n.*?^-->\n", re.MULTILINE | re.DOTALL)
MARKS = re.compile(r'^(```\w+)(?P<gpu> gpu)?(?: needs="\w+")?$', re.MULTILINE)
FETCHED = re.compile(
    r'<(?:script|img|iframe|source)\b[^>]*\ssrc="https?:[^"]*"'
    r'|<link\b[^>]*\brel="?(?:stylesheet|preload|icon)"?[^>]*\shref="https?:[^"]*"'
    r'|<link\b[^>]*\shref="https?:[^"]*"[^>]*\brel="?(?:stylesheet|preload|icon)"?'
)


def place_of(path: Path) -> str:
    """Where a file of the repository is among the sources of the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"repository/{path.relative_to(ROOT).as_posix()}"


def target_of(page: Path, link: str) -> Path:
    """The file that a link of a page means; of a folder its README."""
    path = Path(os.path.normpath(page.parent / link))
    return path / "README.md" if path.is_dir() else path


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/."""
    wanted = [ROOT / name for name in OUTSIDE]
    for page in [*wanted, *(Path(str(file.abs_src_path)) for file in files.documentation_pages())]:
        text = page.read_text(encoding="utf-8")
        wanted += [target_of(page, link) for link in LINK.findall(text)]
    for path in dict.fromkeys(wanted):
        if path.is_file() and path.is_relative_to(ROOT) and not path.is_relative_to(DOCS):
            files.append(File.generated(config, place_of(path), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Points links at where their targets are in the site."""
    source = Path(str(page.file.abs_src_path))
    folder = os.path.dirname(page.file.src_uri)

    def rewrite(match: re.Match[str]) -> str:
        target = target_of(source, match[1])
        if not target.is_file() or not target.is_relative_to(ROOT):
            return match[1]  # which MkDocs then warns of
        return os.path.relpath(place_of(target), folder or ".")

    shown = MARKS.sub(
        lambda match: match[1] + (' title="needs a GPU"' if match["gpu"] else ""),
        HIDDEN.sub("", markdown),
    )
    return LINK.sub(rewrite, shown)


def on_post_build(*, config: MkDocsConfig) -> None:
    """Fails where a page would fetch something from the network, or a block of code is broken."""
    for page in Path(config.site_dir).rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        if "```" in text:
            raise PluginError(f"{page}: a block of code was not taken for one")
        found = FETCHED.search(text)
        if found:
            raise PluginError(f"{page}: {found[0]} would be fetched from the network")
