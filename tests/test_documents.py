"""The documents: names that agree, links that lead somewhere, pages made from the code, examples that run.

`mkdocs build --strict` itself is part of `./dev test`.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from sdpnet import ImageLoader, cli
from sdpnet.config.key_reference import sections

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
# The hook of MkDocs, which is no module of a package.
_spec = importlib.util.spec_from_file_location("reference_pages", ROOT / "scripts" / "reference_pages.py")
assert _spec is not None and _spec.loader is not None
reference_pages = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference_pages)
COMMANDS: dict[str, str] = reference_pages.commands()
PAGES: dict[str, str] = reference_pages.generated_pages()


def in_nav(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    values = entry.values() if isinstance(entry, dict) else entry
    return [page for value in values for page in in_nav(value)]  # type: ignore[attr-defined]


def settings() -> dict[str, object]:
    return yaml.safe_load((ROOT / "mkdocs.yml").read_text())


# ---- names


def test_the_page_about_installation_has_each_extra() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text.partition("\n[project.optional-dependencies]\n")[2].partition("\n[")[0]
    extras = set(re.findall(r"^([a-z0-9-]+) = \[", section, re.MULTILINE))
    rows = re.findall(r"^\| (`.+?`) \|", (DOCS / "how-to/install.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert extras >= {"train", "fp8"} and extras == set(re.findall("`([a-z0-9-]+)`", " ".join(rows)))


@pytest.mark.parametrize(("command", "module"), COMMANDS.items(), ids=COMMANDS)
def test_command_module_and_page_have_one_name(command: str, module: str) -> None:
    word = command.split()[-1].removeprefix("preprocess/").removesuffix(".py")
    assert module.rpartition(".")[2] == word
    page = PAGES[reference_pages.page_of(command)]
    assert page.startswith(f"# {command}\n") and f"usage: {command}" in page
    assert Path(reference_pages.page_of(command)).stem.endswith(word)


def test_every_command_is_in_the_help_and_has_a_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r"    \w", line)]
    assert [f"sdpnet {name}" for name in listed] == [name for name in COMMANDS if name.startswith("sdpnet ")][:-1]
    scripts = {path.stem for path in (ROOT / "preprocess").glob("*.py")} - {"__init__"}
    assert scripts <= {module.rpartition(".")[2] for module in COMMANDS.values()}
    labels = {label for entry in in_nav_entries(settings()["nav"]) for label in entry}
    for command in COMMANDS:
        assert command.removeprefix("python preprocess/") in labels, "the navigation has the same name"


def in_nav_entries(nav: object) -> list[dict[str, object]]:
    found = []
    for entry in nav if isinstance(nav, list) else []:
        if isinstance(entry, dict):
            found.append(entry)
            found += [inner for value in entry.values() for inner in in_nav_entries(value)]
    return found


@pytest.mark.parametrize(("command", "module"), COMMANDS.items(), ids=COMMANDS)
def test_a_page_has_every_flag_of_its_command(command: str, module: str) -> None:
    parser: argparse.ArgumentParser = reference_pages.parser_of(command, module)
    page = PAGES[reference_pages.page_of(command)]
    flags = {flag for action in parser._actions for flag in action.option_strings} - {"-h", "--help"}
    assert flags or command == "sdpnet completion"
    assert all(f"`{flag}" in page for flag in flags)


# ---- pages


def test_the_navigation_has_every_page_once() -> None:
    listed = in_nav(settings()["nav"])
    written = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")}
    assert sorted(listed) == sorted(written | set(PAGES))


def test_the_config_page_has_every_key_with_its_meaning() -> None:
    page = PAGES["reference/config.md"]
    for section in sections():
        for key in section.keys:
            assert page.count(f"\n`{key.name}` ") == 1 and f"Default: `{key.default}`" in page
            assert reference_pages._escaped(key.meaning) in page


def test_every_recipe_and_every_module_is_listed() -> None:
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"## {path.relative_to(ROOT / 'configs').with_suffix('')}\n" in PAGES["reference/recipes.md"]
    listed = set(re.findall(r"^\| `(\w+\.py)` \| \S", PAGES["reference/modules.md"], re.MULTILINE))
    assert {"draws.py", "atomic_write.py", "convert.py", "policies.py", "step.py"} <= listed


def test_nothing_is_fetched_from_a_network() -> None:
    config = settings()
    assert config["theme"]["font"] is False  # type: ignore[index]
    texts = [*PAGES.values(), *(path.read_text() for path in DOCS.rglob("*.md"))]
    assert not [text for text in texts if re.search(r"<script|<link|```mermaid|!\[[^]]*\]\(http", text)]


def test_pictures_are_small() -> None:
    sizes = [path.stat().st_size for path in (DOCS / "images").iterdir()]
    assert sizes and max(sizes) < 150_000 and sum(sizes) < 1_000_000


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "records/README.md", "records/LOG.md"]
)
def test_links_outside_of_the_documents_lead_somewhere(name: str) -> None:
    page = ROOT / name
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if not link.startswith(("http", "mailto")):
            generated = (page.parent / link).resolve()
            inside = generated.relative_to(DOCS).as_posix() if generated.is_relative_to(DOCS) else ""
            assert generated.exists() or inside in PAGES, link


def test_the_readme_is_one_page() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 75


# ---- examples


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


def test_the_loop_of_the_how_to_runs(shard_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("cat.jpg", "dog.png"):
        Image.new("RGB", (40, 30), (200, 100, 50)).save(name)
    train, evaluate, resume, parts, from_config = blocks("how-to/own-loop.md")
    small = {"SHARDS": str(shard_set), "image_size=224": "image_size=32", "=128": "=4", "90": "2", "gpu=64": "gpu=4"}
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 3))
    names: dict[str, Any] = {"model": model, "steps": []}
    for text in (train, evaluate, resume, parts, from_config):
        for old, new in small.items():
            text = text.replace(old, new)
        exec(compile(text.replace("        ...\n", "        steps.append(images)\n"), "own-loop.md", "exec"), names)
        if text.startswith("import torch"):
            assert torch.isfinite(names["loss"]) and len(names["steps"]) == 12
            names["loader"].set_epoch(1)  # as if the training was stopped after one epoch
    assert names["total"] == 10 and len(names["steps"]) == 18 and names["loader"].batch_size == 4
    assert names["images"].shape == (2, 3, 32, 32) and names["targets"].shape == (2, 1000)


def test_the_sampling_of_the_how_to_runs(shard_set: Path) -> None:
    names: dict[str, Any] = {}
    for text in blocks("how-to/sampling.md"):
        exec(compile(text.replace('"SHARDS"', repr(str(shard_set))), "sampling.md", "exec"), names)
    assert {int(label) for _, labels in names["val"] for label in labels} == {0, 1}, "the third class is left out"
    assert (names["loader"].num_samples, names["half"].num_samples, names["val"].num_classes) == (16, 12, 3)
    assert len(names["balanced"]) == len(names["weighted"]) == 3
    with ImageLoader(shard_set, batch_size=9, image_size=32, repeats=3, return_ids=True) as repeated:
        assert all((ids.reshape(3, 3) == ids[:3]).all() for _, _, ids in repeated), "three copies in a batch"
    images, targets = next(iter(names["several"]))
    assert images.shape == (8, 3, 64, 64) and torch.equal(targets, torch.eye(5)[2].expand(8, 5))


def test_the_page_of_examples_shows_each_of_them() -> None:
    page = (DOCS / "how-to/examples.md").read_text()
    files = [path for path in (ROOT / "examples").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    for path in files:
        name = path.relative_to(ROOT / "examples").as_posix()
        shown = f'--8<-- "examples/{name}"' if path.suffix == ".py" else f"](../../examples/{name})"
        assert page.count(shown) == 1 and f"[{name}](" in page


def test_the_pipeline_of_the_how_to_keeps_the_contract(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its samples and labels are the reference's, its pixels are near."""
    from sdpnet.pipelines.loader import make_loader
    from sdpnet.pipelines.options import AugmentOptions, DataOptions, ShardOptions

    module = ModuleType("sdpnet.pipelines.executors.pillow")
    exec(compile(blocks("how-to/pipeline.md")[0], "pipeline.md", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    data = DataOptions(path=str(shard_set), pipeline="torchvision", image_size=32, batch_size_per_gpu=4, num_workers=1)
    reference = make_loader(data, AugmentOptions(), "train", ShardOptions(), torch.device("cpu"), seed=0)
    own = module.make(reference.source, reference.manifest)
    for theirs, ours in zip(reference.batches(1, 2), own.batches(1, 2), strict=True):
        assert torch.equal(theirs.sample_ids, ours.sample_ids) and torch.equal(theirs.labels, ours.labels)
        assert (theirs.images.float() - ours.images.float()).abs().mean() < 2
