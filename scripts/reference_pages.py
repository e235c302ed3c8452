"""The pages of the documents that are made from the code: commands, config keys, recipes. A hook of MkDocs.

Commands come from their argparse parsers, config keys from `sdpnet.config.key_reference`, recipes from the files in
configs/. Links of a page to files of the repository outside of docs/ (`../records/X.json`) lead to copies in the site.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import posixpath
import re
from pathlib import Path
from typing import Any, Final

from sdpnet import cli
from sdpnet.config.key_reference import sections
from sdpnet.config.names import CONFIG_DIRECTORY
from sdpnet.pipelines.terminal.command_line import CommandParser

ROOT: Final = Path(__file__).resolve().parent.parent
COMMANDS: Final = "reference/commands"
# Files of the repository that pages may link to: they become part of the site, under the same path.
SHARED: Final = (
    *("records/*.json", "records/*.md", "configs/**/*.yaml", "examples/*.py", "examples/*.ipynb"),
    *("examples/*.yaml", "examples/kubernetes/*.yaml", "examples/slurm/*.sbatch"),
    *("CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "SECURITY.md"),
)


def commands() -> dict[str, str]:
    """What a person types -> the module that does it."""
    found = {f"sdpnet {name}": command.module for name, command in cli.COMMANDS.items()}
    found["sdpnet bench step"] = cli.STEP.module
    scripts = sorted(path.stem for path in (ROOT / "preprocess").glob("*.py") if path.stem != "__init__")
    modules = {name: f"sdpnet.preprocess.{name}" for name in scripts}
    return found | {
        f"python preprocess/{name}.py": module for name, module in modules.items() if module not in found.values()
    }


def page_of(command: str) -> str:
    """The page of a command: its name, without what it is started with."""
    name = command.removeprefix("sdpnet ").removeprefix("python preprocess/").removesuffix(".py")
    return f"{COMMANDS}/{name.replace(' ', '_')}.md"


def parser_of(command: str, module: str) -> argparse.ArgumentParser:
    """The argparse parser that a command uses."""
    parser = CommandParser(prog=command)
    importlib.import_module(module).add_arguments(parser)
    return parser


def command_page(command: str, module: str) -> str:
    """A command's page: what it does, its usage, its arguments."""
    parser = parser_of(command, module)
    lines = [f"# {command}", "", *_docstring(importlib.import_module(module).__doc__ or "")]
    lines += ["```text", parser.format_usage().strip(), "```", "", "## Arguments", ""]
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        help_text = _expanded(action, parser)
        lines += [f"`{_invocation(action)}`", "", f":   {_sentence(help_text)}", ""]
    if parser.epilog:
        lines += [parser.epilog, ""]
    where = module.replace(".", "/").removeprefix("sdpnet/") if "preprocess" in module or "pipelines" in module else ""
    lines.append(f"Source: `{where or module.replace('.', '/')}.py`")
    if command.startswith("python preprocess/"):
        lines[-1] += f". From an installation without the checkout: `python -m {module}`."
    return "\n".join(lines) + "\n"


def _expanded(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    return (action.help or "") % {**vars(action), "prog": parser.prog}


def _sentence(text: str) -> str:
    text = text.replace("<", "&lt;").replace("*", "\\*")
    return text[:1].upper() + text[1:] + ("" if text.endswith(".") else ".")


def _invocation(action: argparse.Action) -> str:
    values = "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    name = action.metavar or values
    shown = " ".join(name) if isinstance(name, tuple) else name
    if not action.option_strings:
        return f"{shown} ..." if action.nargs in ("+", "*") else shown
    flags = ", ".join(action.option_strings)
    return flags if action.nargs == 0 else f"{flags} {shown}"


def _docstring(text: str) -> list[str]:
    """Paragraphs; those with indented or aligned lines are code."""
    lines: list[str] = []
    for paragraph in text.strip().split("\n\n"):
        body = paragraph.strip("\n")
        if not lines:
            body = _without_usage(body)
        if re.search(r"\S {2,}\S|^ {4}", body, re.MULTILINE):
            lines += ["```text", *(line.removeprefix("    ") for line in body.split("\n")), "```", ""]
        else:
            lines += [body[:1].upper() + body[1:], ""]
    return lines


def _without_usage(text: str) -> str:
    """The first paragraph of a module's docstring without the command line in it: the usage comes from the parser."""
    text = re.sub(r"^(Command: |(Command )?`sdpnet [a-z]+`: )", "", text)
    return re.sub(r":\s(`[^`]*`\.?|python .*)$", ".", text)


def command_index() -> str:
    lines = ["# Commands", "", "Every page is made from the parser that the command itself uses.", ""]
    lines += ["| command | what it does |", "|---|---|"]
    for command, module in commands().items():
        purpose = _docstring(importlib.import_module(module).__doc__ or "")[0]
        link = posixpath.basename(page_of(command))
        lines.append(f"| [`{command}`]({link}) | {' '.join(purpose.split())} |")
    lines += [
        "",
        "In a checkout, `train` is short for `sdpnet train`. Under torchrun, it is `torchrun --nproc_per_node=8 -m",
        "sdpnet.train`.",
        "`sdpnet COMMAND --help` prints the same as these pages. Every command ends with the next one to type. A",
        "mistake ends in one line that says what is wrong, where, and what to do, with exit status 2.",
    ]
    return "\n".join(lines) + "\n"


def config_page() -> str:
    """Every config key: its meaning, default and range."""
    lines = ["# Config keys", ""]
    lines += [
        "A config is a YAML file of sections and keys; see [Recipes](recipes.md) for the ones that come along. Any key",
        "can also be set on the command line: `optim.lr=1e-3`. A mistyped key is an error that names the nearest",
        "one. `sdpnet config` prints this page in a terminal, and `sdpnet config --diff A B` what differs between two",
        "configs. A file may begin with `extends: NAME`: it then has the keys of that config, except for its own.",
        "",
    ]
    for section in sections():
        anchor = section.name or "top"
        lines += [f"## {section.name or 'top level'} {{ #{anchor} }}", "", section.summary, ""]
        for key in section.keys:
            lines += [f"`{key.name}` {{ #{key.name} }}", ""]
            lines += [
                f":   {_escaped(key.meaning)}",
                "",
                f"    Default: `{key.default}`. Allowed: {_escaped(key.allowed)}.",
                "",
            ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    """Outside of backticks, what Markdown would take for HTML or for a link."""
    parts = text.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("[", "\\[") for part in parts[::2]]
    return "`".join(parts)


def recipes_page() -> str:
    """The configs that come along, with what the comment at the top of each says."""
    lines = ["# Recipes", "", "The configs in `configs/`, by the name that `--config` takes.", ""]
    for path in sorted(CONFIG_DIRECTORY.rglob("*.yaml"), key=lambda path: (len(path.parts), path.name)):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(CONFIG_DIRECTORY).with_suffix(""))
        comment, body = re.fullmatch(r"((?:#[^\n]*\n)+)(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
        said = [line.removeprefix("#").removeprefix(" ") for line in comment.splitlines()]
        prose = [line for line in said if not line.startswith("  ")]
        lines += [f"## {name}", "", " ".join(prose), "", "```yaml", body.strip(), "```", ""]
    return "\n".join(lines) + "\n"


def rooms() -> list[tuple[str, str]]:
    """The folders of the three packages, each with the first line of its docstring."""
    found = [path for package in ("preprocess", "pipelines", "sdpnet") for path in _modules(package)]
    return [(path.parent.relative_to(ROOT).as_posix(), _first(path)) for path in found if path.name == "__init__.py"]


def modules_page() -> str:
    """Every folder and file of the three packages with the first sentence of its docstring."""
    lines = ["# What is where", ""]
    lines += [
        "The first sentence of every module. [Architecture](../explanation/architecture.md) says why it lies there.",
        "",
    ]
    for folder, job in rooms():
        lines += [f"## {folder}/", "", _escaped(job), ""]
        inside = [path for path in _modules(folder.split("/")[0]) if path.parent == ROOT / folder]
        rows = [f"| `{path.name}` | {_escaped(_first(path))} |" for path in inside if path.name != "__init__.py"]
        lines += ["| file | job |", "|---|---|", *rows, ""] if rows else []
    return "\n".join(lines) + "\n"


def _modules(package: str) -> list[Path]:
    """The files of a package in the order of a tree; what links lead to is listed where it lies."""
    found = [path for path in (ROOT / package).rglob("*.py") if path.parent.resolve() == path.parent]
    return sorted(found, key=lambda path: (path.parent.as_posix(), path.name))


def _first(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    sentence = _without_usage(" ".join(text.split("\n\n")[0].split()))
    return (sentence[:1].upper() + sentence[1:]).replace("|", "\\|")


def generated_pages() -> dict[str, str]:
    """Path in docs/ -> Markdown, of all pages that are made from the code."""
    pages = {page_of(command): command_page(command, module) for command, module in commands().items()}
    return {
        **pages,
        f"{COMMANDS}/index.md": command_index(),
        "reference/config.md": config_page(),
        "reference/recipes.md": recipes_page(),
        "reference/modules.md": modules_page(),
    }


# ---- what MkDocs calls


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File, InclusionLevel

    for path, text in generated_pages().items():
        files.append(File.generated(config, path, content=text))
    for path in sorted(found for pattern in SHARED for found in ROOT.glob(pattern)):
        name = path.relative_to(ROOT).as_posix()
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, abs_src_path=str(path), inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links that leave docs/ into links to the copies in the site, and fills in the table of the rooms."""
    if not (ROOT / "docs" / page.file.src_uri).is_file():
        return markdown  # made here, or one of `SHARED`
    table = ["| room | job |", "|---|---|", *(f"| `{folder}/` | {_escaped(job)} |" for folder, job in rooms())]
    markdown = markdown.replace("<!-- rooms -->", "\n".join(table))
    above = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"](../{above}", f"]({above}")
