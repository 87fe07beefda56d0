"""Builds the site into ``site/``: ``python docs/build_site.py``, as ``make docs`` does.

The documents are copied with the layout of the repository, so that their links work on both sides; notebooks
become pages, and every public name of the packages gets an entry in the API reference. The build fails on a
warning, a dead link, something loaded from elsewhere, and a public name without documentation.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import griffe

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "site"
DOCUMENTS = (
    "*.md",
    "LICENSE",
    "CITATION.cff",
    "docs/**/*.md",
    "docs/**/*.png",
    "docs/**/*.py",
    "benchmarks/*.md",
)
PACKAGES = ("ifdefense", "attacks", "classifiers", "benchmarks")
HIDDEN = ("cli", "__main__")
"""Modules of commands, which docs/cli.md describes."""

LOADING = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
"""Elements that load something, and the attribute that says what."""


class SiteError(Exception):
    """Raised with everything that is wrong."""


def copy_documents() -> None:
    """Copies the documents; links to notebooks become links to their pages."""
    shutil.rmtree(PAGES, ignore_errors=True)
    for file in sorted({file for pattern in DOCUMENTS for file in ROOT.glob(pattern)}):
        target = PAGES / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            text = re.sub(r"(\]\([^)\s:]+)\.ipynb\)", r"\1.md)", file.read_text(encoding="utf-8"))
            target.write_text(text, encoding="utf-8")
        else:
            shutil.copy(file, target)


def write_tutorials() -> None:
    """Writes each notebook as a page with its code, outputs and pictures."""
    for file in sorted(ROOT.glob("docs/tutorials/*.ipynb")):
        target = (PAGES / file.relative_to(ROOT)).with_suffix(".md")
        target.parent.mkdir(parents=True, exist_ok=True)
        parts: list[str] = []
        for cell in json.loads(file.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            parts.append(f"```python\n{source}\n```" if cell["cell_type"] == "code" else source)
            parts += (_output(output, target, len(parts)) for output in cell.get("outputs", ()))
        text = re.sub(r"(\]\([^)\s:]+)\.ipynb\)", r"\1.md)", "\n\n".join(parts))
        target.write_text(
            f"{text}\n\n*This page is a notebook: `{file.relative_to(ROOT)}`.*\n", encoding="utf-8"
        )


def _output(output: dict[str, Any], page: Path, number: int) -> str:
    """An output as Markdown; a picture becomes a file beside the page."""
    data = output.get("data", {})
    if "image/png" in data:
        picture = page.with_name(f"{page.stem}_{number}.png")
        picture.write_bytes(base64.b64decode("".join(data["image/png"])))
        return f"![Output of the cell above]({picture.name})"
    text = "".join(output["text"] if "text" in output else data["text/plain"])
    return f"```text\n{text.rstrip()}\n```"


def names_of(module: griffe.Module) -> Iterator[str]:
    """Public names that a module defines.

    Raises:
        SiteError: if a class or function has no docstring.
    """
    for name, member in module.members.items():
        if name.startswith("_") or member.is_alias or member.is_module:
            continue
        if not member.has_docstring and not member.is_attribute:
            raise SiteError(f"{member.path} has no docstring")
        if member.has_docstring:
            yield name


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for name, member in sorted(module.modules.items()):
        if not member.is_alias and name not in HIDDEN:
            yield from _modules(member)


def _page_of(module: griffe.Module) -> str:
    """The page of a module: that of its room in ``ifdefense``, else that of its package."""
    package, *rest = module.path.split(".")
    room = package == "ifdefense" and rest and (module.is_package or len(rest) > 1)
    return f"{package}.{rest[0]}" if room else package


def write_reference() -> dict[str, set[str]]:
    """Writes the pages of the API reference.

    First what a package exports, by the name it is imported by, then what its modules define besides.

    Returns:
        The names on each page.
    """
    loader = griffe.GriffeLoader(search_paths=[ROOT])
    pages: dict[str, list[str]] = {}
    names: dict[str, set[str]] = {}

    def add(page: str, address: str, options: str = "") -> None:
        pages.setdefault(page, []).append(f"::: {address}\n{options}")
        names.setdefault(page, set()).add(address)

    for title in PACKAGES:
        package = loader.load(title)
        assert isinstance(package, griffe.Module)
        loader.resolve_aliases()
        done: set[str] = set()
        for module in _modules(package):
            for name in sorted(map(str, module.exports or ()), key=str.lower) if module.is_package else ():
                member = module.members[name]
                target = member.final_target if isinstance(member, griffe.Alias) else member
                if name.startswith("_") or target.path in done:
                    continue
                if not target.has_docstring:
                    raise SiteError(f"{module.path}.{name} has no docstring")
                done.add(target.path)
                add(_page_of(module), f"{module.path}.{name}")
        for module in _modules(package):
            members = [name for name in names_of(module) if f"{module.path}.{name}" not in done]
            if members:
                page = _page_of(module)
                add(page, module.path, f"    options:\n      members: {json.dumps(members)}\n")
                names[page] |= {f"{module.path}.{name}" for name in members}
    folder = PAGES / "api"
    folder.mkdir(parents=True)
    for page, parts in pages.items():
        (folder / f"{page}.md").write_text(f"# `{page}`\n\n" + "\n".join(parts), encoding="utf-8")
    return names


class _Page(HTMLParser):
    """Identifiers, links, and what is loaded."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.identifiers: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes one element."""
        values = {name: value for name, value in attrs if value}
        self.identifiers |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag in LOADING and LOADING[tag] in values:
            self.loaded.append(values[LOADING[tag]])


def problems(site: Path, names: dict[str, set[str]]) -> list[str]:
    """What is wrong with a site.

    Args:
        site: folder of the pages.
        names: names that have to be documented on each page of ``api/``.
    """
    pages = {file: _Page(file.read_text(encoding="utf-8")) for file in sorted(site.rglob("*.html"))}
    pages = {file: page for file, page in pages.items() if file.name != "404.html"}
    found: list[str] = []
    for file, page in pages.items():
        title = file.relative_to(site)
        for address in page.loaded + page.links:
            parts = urlsplit(address)
            if parts.scheme or parts.netloc:
                if address in page.loaded and parts.scheme != "data":
                    found.append(f"{title} loads {address}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                found.append(f"{title} links to {address}, which does not exist")
            elif (
                parts.fragment
                and target in pages
                and unquote(parts.fragment) not in pages[target].identifiers
            ):
                found.append(f"{title} links to {address}, where nothing has this name")
    for name, expected in names.items():
        file = site / "api" / f"{name}.html"
        known = pages[file].identifiers if file in pages else set()
        found += [
            f"{address} is not documented in {file.relative_to(site)}" for address in sorted(expected - known)
        ]
    return found


def main() -> int:
    """Builds and checks the site."""
    copy_documents()
    write_tutorials()
    names = write_reference()
    configuration = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    written = {f"{file.relative_to(PAGES)}" for file in PAGES.rglob("*.md")}
    missing = sorted(page for page in written if page not in configuration)
    if missing:
        raise SiteError(f"not in the navigation of mkdocs.yml: {', '.join(missing)}")
    shutil.rmtree(SITE, ignore_errors=True)
    command = [Path(sys.executable).with_name("zensical"), "build", "--strict", "--clean"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SiteError("the site was not built: see the warnings above")
    found = problems(SITE, names)
    if found:
        raise SiteError("\n".join(found))
    total = sum(map(len, names.values()))
    print(f"{len(list(SITE.rglob('*.html')))} pages in {SITE}, {total} names of the API, no dead link")  # noqa: T201
    return 0


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except SiteError as error:
        raise SystemExit(str(error)) from None
