"""Makes the pages of the site that stand nowhere else as Markdown: commands, help topics, changelog, files to copy.

A guide links to files of the repository as they lie there, so that it can be read on GitHub too; in the site those
links lead to the page that shows the file.
"""

from __future__ import annotations

import html
import importlib
import json
import posixpath
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from prunectl.api import keywords
from prunectl.commands.app import COMMANDS, TOPICS
from prunectl.commands.help import topic_lines

_page: Any = importlib.import_module("prunectl.commands._help_page")
ROOT = Path(__file__).parents[1]
MOVED = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "examples": "files.md",
}
SHOWN = (
    "action.yml",
    ".pre-commit-hooks.yaml",
    "examples/github-workflow.yml",
    "examples/gitlab-ci.yml",
    "examples/Makefile",
    "examples/tour.ipynb",
    "examples/prunectl-entropy",
    "examples/prunectl-npz",
    "prunectl/checks/budgets.schema.json",
    "fixtures/README.md",
)
"""Files and packages that guides and other pages link to."""
SELDOM_SOUGHT = ("figures.md", "coverage.md", "design.md", "files.md")
"""Pages of so many words and numbers that a search would find them first."""
LANGUAGES = {".yml": "yaml", ".yaml": "yaml", ".py": "python", ".toml": "toml", ".json": "json", ".md": "markdown"}
_LINK = re.compile(r"\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are made here."""
    made = {new: (ROOT / old).read_text() for old, new in MOVED.items() if old.isupper() or old[0] in "CS"}
    made |= {f"commands/{name}.md": command_page(name) for name in COMMANDS}
    made |= {
        "commands/index.md": commands_page(),
        "commands/topics.md": topics_page(),
        "files.md": files_page(),
        "python-reference.md": reference_page(),
    }
    from mkdocs.structure.files import File  # noqa: PLC0415 - what makes the site has it, and the tests have not

    for name, text in made.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Lead links to files of the repository to the pages that show them."""
    here = page.file.src_uri
    moved = {new: old for old, new in MOVED.items()}
    if here in SELDOM_SOUGHT:
        page.meta["search"] = {"boost": 0.3}
    if here == "files.md" or here.startswith("commands/"):
        return markdown
    source = moved.get(here, f"docs/{here}") if here != "index.md" else "docs/index.md"
    folder = posixpath.dirname(source)

    def lead(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        section = match[2] or ""
        if path in MOVED:
            path = MOVED[path]
        elif path in SHOWN:
            path, section = "files.md", f"#{slug(path)}"
        else:
            path = path.removeprefix("docs/") if path.startswith("docs/") else path
        return f"]({posixpath.relpath(path, posixpath.dirname(here) or '.')}{section})"

    return lead_to_pictures(_LINK.sub(lead, markdown), page.url)


def lead_to_pictures(markdown: str, url: str) -> str:
    """Pictures in HTML by where they are from the page, of which each is a folder of the site."""
    up = "../" * url.count("/")
    for name in _PICTURE.findall(markdown):
        if not (ROOT / "docs" / "pictures" / name).is_file():
            raise FileNotFoundError(f"docs/pictures/{name}")
    return _PICTURE.sub(rf'="{up}pictures/\1"', markdown)


_PICTURE = re.compile(r'="pictures/([^"]+)"')


def slug(path: str) -> str:
    """Return the anchor of a file on the page of files."""
    return re.sub(r"\W+", "-", path).strip("-").lower()


def guide_of(command: str) -> str:
    """Return the guide that has a section on a command."""
    pages = (ROOT / "docs").glob("*.md")
    return next(path.name for path in pages if f"\n## {command}\n" in path.read_text())


def command_page(name: str) -> str:
    """Return what a command does, its examples and all its options, from its own table of options."""
    module, line = COMMANDS[name]
    command = importlib.import_module(module).command
    paragraphs, examples = _page.split_description(command)
    arguments = [param for param in command.params if isinstance(param, _page.TyperArgument)]
    options = [param for param in command.params if not isinstance(param, _page.TyperArgument) and not param.hidden]
    usage = " ".join(("prunectl", name, *map(_page.argument_name, arguments), "[OPTIONS]"))
    lines = [f"# {name}", "", line, "", f"The guide: [{name}](../{guide_of(name)}#{name}).", ""]
    lines += ["```text", usage, "```", "", *(f"{text(paragraph)}\n" for paragraph in paragraphs)]
    lines += ["```console", *(f"$ {example}" for example in examples), "```", ""]
    lines += table("Arguments", [(_page.argument_name(one), one) for one in arguments])
    for title, group in groupby(_page._by_panel(options), _page._panel):
        lines += table(title, [(option_names(one), one) for one in group])
    return "\n".join(lines) + "\n"


def option_names(option: Any) -> str:
    """Return the spellings of an option, with what stands for its value."""
    spellings = ", ".join(sorted(_page.spellings_of(option), key=len))
    return spellings if option.is_flag else f"{spellings} {_page.value_name(option)}"


def table(title: str, rows: list[tuple[str, Any]]) -> Iterator[str]:
    """Yield a section with a table of options."""
    if rows:
        head = "argument" if title == "Arguments" else "option"
        yield from (f"## {title}", "", f"| {head} | meaning |", "| --- | --- |")
        for names, param in rows:
            shown = html.escape(names).replace("|", "&#124;")
            yield f"| <code>{shown}</code> | {text(_page._meaning(param))} |"
        yield ""


def text(words: str) -> str:
    """Return words in which nothing is markup, with options as code."""
    plain = re.sub(r"([\\*_`\[\]|#])", r"\\\1", html.escape(" ".join(words.split()), quote=False))
    return re.sub(r"(?<![\w-])--?[a-z][a-z0-9-]*", r"<code>\g<0></code>", plain)


def commands_page() -> str:
    """Return the list of commands."""
    rows = [f"| [{name}]({name}.md) | {text(line)} |" for name, (_, line) in COMMANDS.items()]
    head = ["# Commands", "", "| command | |", "| --- | --- |"]
    return "\n".join([*head, *rows, "", "[Help topics](topics.md).", ""])


def topics_page() -> str:
    """Return what `prunectl help TOPIC` prints, topic by topic."""
    lines = ["# Help topics", "", "What `prunectl help TOPIC` prints.", ""]
    for topic in TOPICS:
        title, *rest = topic_lines(topic)
        lines += [f"## {topic}", "", "```text", title, *rest, "```", ""]
    return "\n".join(lines) + "\n"


def files_page() -> str:
    """Return the files that are there to be copied, each with its content."""
    lines = ["# Files to copy", ""]
    for name in SHOWN:
        path = ROOT / name
        lines += [f"## {name} {{#{slug(name)}}}", ""]
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file() and "__pycache__" not in file.parts:
                if path.is_dir():
                    lines += [f"`{file.relative_to(ROOT).as_posix()}`", ""]
                lines += block(file)
    return "\n".join(lines) + "\n"


def block(file: Path) -> list[str]:
    """Return a file as a block of code; of a notebook its code."""
    if file.suffix == ".ipynb":
        cells = json.loads(file.read_text())["cells"]
        shown = ("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        content, language = "\n\n".join(shown), "python"
    else:
        content, language = file.read_text().rstrip(), LANGUAGES.get(file.suffix, "make")
    return [f"````{language}", *content.splitlines(), "````", ""]


def reference_page() -> str:
    """Return the page of functions, which mkdocstrings fills from signatures and docstrings."""
    members = [name for name in vars(keywords) if name.endswith("Options") and not name.startswith("_")]
    options = ["    options:", "      heading_level: 3", f"      members: [{', '.join(members)}]"]
    head = ["# Functions", "", "::: prunectl.api", "", "## Keywords", "", "::: prunectl.api.keywords"]
    return "\n".join([*head, *options, ""])
