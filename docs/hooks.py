"""What MkDocs does not do by itself: pages from outside of this folder, the API's pages, formulas as MathML.

MkDocs calls the functions by their names.
"""

from __future__ import annotations

import html
import importlib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = {  # of the repository, and where they are on the site
    "README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md",
    "results/README.md": "results.md", "sweeps/README.md": "sweeps.md",
}  # fmt: skip
API: dict[str, tuple[str, dict[str, tuple[str, ...] | None]]] = {
    "api": ("The package", {"wdat": None}),
    "attacks": ("Attacks and certificates", {"wdat.attacks": None, "wdat.certify": None}),
    "training": (
        "Objectives, sensitivity, training",
        {
            "wdat.objectives": ("Objective", "WDAT", "TRADES", "Combined", "PGDAT", "AttackAT", "Clean"),
            "wdat.sensitivity": None,
        },
    ),
    "models": ("Models and data", {"wdat.models": None, "wdat.data": None}),
}
FIGURES = re.compile(r"<td>(?=(?:<strong>)?[-+−–≤\[\d][^a-z]*(?:<strong>|</strong>)?[^a-z]*</td>)")
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]*)")  # in Markdown, to a file
SHOWN = (".png", ".json", ".ipynb")  # kinds of files that a page may link to


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the repository, what they link to, and the reference."""
    for source, target in PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=relinked(text, PurePosixPath(source), files, config)))
    shown: set[str] = set()
    for name, (title, modules) in API.items():
        files.append(File.generated(config, f"api/{name}.md", content=reference(title, modules, shown)))
    return files


def reference(title: str, modules: dict[str, tuple[str, ...] | None], shown: set[str]) -> str:
    """A page of the reference: the public functions and classes of some modules, or those that are listed.

    Args:
        title: Of the page.
        modules: For each the names, None for all that it exports.
        shown: Where names are defined that are on a page already; those of this page are added.
    """
    parts = [f"# {title}"]
    for module, listed in modules.items():
        found = importlib.import_module(module)
        things = {name: getattr(found, name) for name in listed or found.__all__}
        homes = [_home(thing, module, name) for name, thing in things.items() if callable(thing)]
        new = [home for home in dict.fromkeys(homes) if home not in shown and home.startswith("wdat.")]
        parts += [f"## `{module}`", *(f"::: {home}" for home in new)]
        shown.update(new)
    return "\n\n".join(parts) + "\n"


def _home(thing: Any, module: str, name: str) -> str:
    """Where a name is defined, which is where its docstring is found."""
    return f"{getattr(thing, '__module__', module)}.{getattr(thing, '__name__', name)}"


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Links of the pages of this folder to the rest of the repository."""
    source = page.file.src_uri
    if source in PAGES.values() or source.startswith("api/"):
        return markdown
    return relinked(markdown, PurePosixPath("docs") / source, files, config)


def relinked(text: str, source: PurePosixPath, files: Files, config: MkDocsConfig) -> str:
    """A page of the repository with its links as they are on the site.

    A link to a file that is no page of the site becomes one to a copy of the file; one to a folder becomes text.
    """
    here = PurePosixPath(PAGES.get(str(source), str(source).removeprefix("docs/"))).parent

    def link(match: re.Match[str]) -> str:
        path = os.path.normpath(source.parent / match[2])
        target = PAGES.get(path, "index.md" if path == "docs/README.md" else path.removeprefix("docs/"))
        if path not in PAGES and not path.startswith("docs/") and files.get_file_from_path(target) is None:
            content = (ROOT / path).read_bytes()
            files.append(File.generated(config, target if "." in target else f"{target}.txt", content=content))
            target = target if "." in target else f"{target}.txt"
        return match[1] + os.path.relpath(target, here)

    outside = re.split(r"(^```.*?^```$|`[^`\n]*`)", text, flags=re.M | re.S)
    return "".join(part if i % 2 else LINK.sub(link, part) for i, part in enumerate(outside))


def on_page_content(content: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    r"""Formulas, which are `\(...\)` and `\[...\]` by now, as MathML, for which no script and no font is loaded.

    Cells that hold figures and nothing else are marked, so that intervals aren't broken into lines.
    """
    for tag, ends, display in (("span", (r"\(", r"\)"), "inline"), ("div", (r"\[", r"\]"), "block")):
        pattern = rf'<{tag} class="arithmatex">{re.escape(ends[0])}(.*?){re.escape(ends[1])}</{tag}>'
        pieces = re.split(pattern, content, flags=re.S)
        pieces[1::2] = [_mathml(html.unescape(formula), display) for formula in pieces[1::2]]
        content = "".join(pieces)
    return FIGURES.sub('<td class="figures">', content)


def _mathml(formula: str, display: str) -> str:
    """A formula with the bars of norms as tall on the right, where an index follows, as on the left."""
    return str(convert(formula, display=display)).replace("<mo>&#x02016;<", '<mo stretchy="false">&#x02016;<')
