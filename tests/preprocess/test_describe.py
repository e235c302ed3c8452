from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversion import convert_folder, write_manifest
from page_source import figures, require_self_contained, without_library
from PIL import Image

from sdpnet.pipelines.errors import printable
from sdpnet.pipelines.shards.layout import open_split
from sdpnet.preprocess.describe import main
from sdpnet.preprocess.encoding.encode import codec
from sdpnet.preprocess.inspection.text import file_size
from sdpnet.preprocess.inspection.words import how_stored, written_by

SCRIPT = Path(__file__).resolve().parents[2] / "preprocess" / "describe.py"
VOID = {"meta", "img"}  # the elements without an end tag that the page has
HOSTILE = ("<script>alert(1)</script>", "a&amp;b \"quoted\" 'name'", "猫 \u202egnp.exe\x1b[31m\udcff:cow:[red]")


class Page(HTMLParser):
    """A page as a browser sees it: elements with their text, and what it refers to. Fails where tags do not balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[str] = []
        self.images: list[Image.Image] = []
        self.references: list[str] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.value_tables: list[list[list[str]]] = []  # below the charts
        self._open: list[str] = []
        self.feed(self.source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        attributes = dict(attrs)
        self.references += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "data", "action")]
        assert not any(key.startswith("on") for key, _ in attrs)
        if tag == "img":
            assert attributes["alt"]
            prefix, data = str(attributes["src"]).split(",", 1)
            assert prefix == "data:image/jpeg;base64"
            with Image.open(BytesIO(base64.b64decode(data, validate=True)), formats=["JPEG"]) as image:
                image.load()
                self.images.append(image)
        elif tag == "table":
            self.values = attributes.get("class") == "values"
            (self.value_tables if self.values else self.tables).append([])
        elif tag == "tr":
            self._table.append([])
        elif tag in ("td", "th"):
            self._table[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag}/> has no meaning in HTML")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self._open):
            self.text += data
        if "td" in self._open or "th" in self._open:
            self._table[-1][-1] += data

    @property
    def _table(self) -> list[list[str]]:
        return (self.value_tables if self.values else self.tables)[-1]

    @property
    def charts(self) -> list[dict[str, Any]]:
        """The charts' figures; each one's numbers are in the table below it, too."""
        found = figures(self.source)
        for figure, (_, *rows) in zip(found, self.value_tables, strict=True):
            (bars,) = figure["data"]
            assert [": ".join(row) for row in rows] == bars["text"]
            assert [row[1] for row in rows] == [f"{count:,}" for count in bars["y"]]
        return found


def copy_of(shard_set: Path, to: Path, **changes: Any) -> Path:
    """A shard set's copy whose manifest has other values."""
    shutil.copytree(shard_set, to)
    manifest = json.loads((to / "manifest.json").read_text())
    manifest.update(changes)
    write_manifest(to, manifest)
    return to


def show(directory: Path, *flags: object) -> Page:
    assert main([str(directory), *map(str, flags)]) == 0
    return Page(directory / "report.html")


@pytest.fixture
def shards(shard_set: Path, tmp_path: Path) -> Path:
    return copy_of(shard_set, tmp_path / "shards")


def test_the_page_has_the_numbers_of_the_set(
    shards: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = show(shards)
    readers = [open_split(shards, name)[1] for name in ("train", "val")]
    nbytes = [np.array([len(reader.encoded(i)) for i in range(reader.num_samples)]) for reader in readers]
    sizes = [
        np.array([Image.open(BytesIO(reader.encoded(i).tobytes())).size for i in range(reader.num_samples)])
        for reader in readers
    ]

    def spread(values: np.ndarray) -> str:
        return f"{values.min():,} to {values.max():,}, median {np.median(values):,.0f}"

    head, *rows = page.tables[0]
    assert head == ["", "train", "val"]
    facts = {label: cells for label, *cells in rows}
    assert facts["images"] == ["24", "10"] and facts["classes with images"] == ["3 of 3", "3 of 3"]
    assert facts["images a class"] == ["8", "3 to 4, median 3"]
    assert facts["longer side, pixels"] == [spread(size.max(1)) for size in sizes]
    assert facts["shorter side, pixels"] == [spread(size.min(1)) for size in sizes]
    ratios = [size[:, 0] / size[:, 1] for size in sizes]
    assert facts["width / height"] == [f"{r.min():.2f} to {r.max():.2f}, median {np.median(r):.2f}" for r in ratios]
    assert facts["bytes an image"] == [spread(n) for n in nbytes]
    assert facts["bytes an image, mean"] == [f"{n.mean():,.0f}" for n in nbytes]
    assert facts["bytes of all images"] == [f"{n.sum():,}" for n in nbytes]
    files = [(shards / f"{name}.beton").stat().st_size for name in ("train", "val")]
    assert facts["bytes of the files"] == [f"{size:,}" for size in files]
    terminal = capsys.readouterr().out
    assert f"{image_folder.name}: 34 images, 3 classes, {sum(files):,} bytes" in terminal
    for text in (page.text, terminal):
        assert f"{sum(files):,} bytes" in text
        assert "JPEGs of quality 90 with chroma 4:2:0; the longer side at most 500 pixels; all encoded anew" in text
        assert codec().split(", ", 1)[-1] in text and "max_side" not in text and "restart_rows" not in text
        assert "No image was left out." in text
    read = re.search(r"read in an epoch: ([\d.]+) kB", terminal)
    kept = re.search(r"kept by the crops: (\d+)%", terminal)
    assert read and float(read[1]) == pytest.approx(nbytes[0].sum() / 1000, rel=0.005)
    assert kept and 20 < int(kept[1]) < 80
    assert f"{read[1]} kB" in page.text and f"{kept[1]}%" in page.text


def test_the_page_needs_nothing_else(shards: Path) -> None:
    page = show(shards)
    require_self_contained(page.source)
    assert "http" not in without_library(page.source).replace("http-equiv", "")
    assert not {"link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert "prefers-color-scheme: dark" in page.source and 'name="viewport"' in page.source
    assert len(page.images) == 48 and all(max(image.size) <= 224 for image in page.images)
    assert len(without_library(page.source)) < 2_000_000


def test_charts_count_every_image(shards: Path) -> None:
    charts = show(shards).charts
    assert len(charts) == 8
    for chart, total in zip(charts, [24, 10] * 4, strict=True):
        assert sum(chart["data"][0]["y"]) == total
        assert chart["layout"]["yaxis"]["title"]["text"] == "images"
        assert chart["layout"]["xaxis"]["title"]["text"] in ("pixels", "width : height", "bytes")


def test_few_classes_are_bars_with_the_largest_first(shards: Path) -> None:
    _, train, val = show(shards).tables
    assert train == [["ant", "", "8"], ["bee", "", "8"], ["cow", "", "8"]]
    assert val == [["ant", "", "4"], ["bee", "", "3"], ["cow", "", "3"]]


def test_what_comes_from_the_data_is_text_everywhere(
    shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shards = copy_of(
        shard_set,
        tmp_path / "shards",
        classes=HOSTILE,
        source='</title><img src="http://x/" onerror=x>\n',
        encode={"<b>": ["</style>"]},
        created_by="<i>&",
    )
    entry = {"split": "<u>", "file": "\udcff</li>", "reason": "<h1>why\n&lt;"}
    (shards / "quarantine.jsonl").write_text(json.dumps(entry) + "\n")
    page = show(shards)
    require_self_contained(page.source)
    assert len(page.images) == 48
    names = [printable(name) for name in HOSTILE]
    assert names[:2] == list(HOSTILE[:2]) and names[2] == r"猫 \u202egnp.exe\x1b[31m\xff:cow:[red]"
    terminal = capsys.readouterr().out
    assert "\x1b" not in terminal and "\u202e" not in terminal
    assert {row[0] for row in page.tables[1]} == set(names)
    for text in (r'</title><img src="http://x/" onerror=x>\n', "<b> ['</style>']", "<i>&", r"<h1>why\n&lt;"):
        assert text in page.text and text in terminal
    assert r"<u>/\xff</li>" in page.text
    assert page.tags.count("h1") == page.tags.count("title") == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {},
            "quality 80 with chroma 4:4:4; every image at its own size; all kept without loss; turned upright by EXIF",
        ),
        ({"restart_rows": 0}, "; no restart markers"),
        ({"restart_rows": 1}, "; a restart marker at each row of blocks, for fast crops"),
        ({"restart_rows": 2}, "; a restart marker at every 2 rows of blocks, for fast crops"),
        ({"max_side": 1500}, "; the longer side at most 1,500 pixels; "),
        ({"reencode": "auto"}, "; JPEGs that are small enough kept without loss; "),
        ({"reencode": "sometimes", "new_key": [1]}, "; reencode sometimes; new key [1]"),
    ],
)
def test_settings_in_words(changes: dict[str, Any], words: str) -> None:
    settings = {"exif": "apply", "max_side": 0, "quality": 80, "reencode": "never", "subsampling": "4:4:4", **changes}
    text = how_stored(settings)
    assert words in text and text.startswith("JPEGs of quality 80") and "_" not in text


def test_who_wrote_it_in_words() -> None:
    assert written_by("native codec 4, libjpeg-turbo 2.1.5, Pillow 13") == (
        "sdpnet's own JPEG codec (version 4) with libjpeg-turbo 2.1.5, Pillow 13"
    )
    assert written_by("Pillow 13") == "Pillow 13" and how_stored({"encoder": "another program"}) == (
        "as another program encoded them"
    )


def test_21841_classes(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    classes = ["ant", "bee", "cow", *(f"n{i:08}" for i in range(21_838))]
    page = show(copy_of(shard_set, tmp_path / "shards", classes=classes), "--images", 2)
    listed = ", ".join(classes[3:13])
    assert f"val has no image of 21,838 of 21,841 classes: {listed} and 21,828 more." in page.text
    assert len(page.charts) == 10 and len(without_library(page.source)) < 500_000
    notes = re.findall(r"(\d+) beyond, up to", page.text)
    for chart, counts, beyond in zip(page.charts, ([21_838, 3], [21_838, 2, 1]), notes, strict=False):
        drawn = chart["data"][0]["y"]
        assert sum(drawn) + int(beyond) == sum(counts) and drawn[0] == counts[0]
    assert page.tables[1:] == [
        [["ant", "8"], ["bee", "8"], ["cow", "8"]],
        [["ant", "4"], ["bee", "3"], ["cow", "3"]],
    ]
    terminal = capsys.readouterr().out
    assert "val: most images of ant (4), fewest of cow (3)" in terminal
    assert "train: 8 images of each class that has any" in terminal and "fewest of cow (8)" not in terminal
    assert "train: no image of 21,838 classes, the first n00000000" in terminal


def test_many_classes_show_both_ends_and_equal_ones_no_chart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in range(45):
        for split, count in (("train", 1 + label % 9), ("val", 1)):
            (tmp_path / split / f"c{label:02}").mkdir(parents=True)
            for number in range(count):
                Image.new("L", (8, 8)).save(tmp_path / split / f"c{label:02}" / f"{number}.png")
    convert_folder(tmp_path, tmp_path / "shards")
    page = show(tmp_path / "shards", "--images", 0)
    most = [[f"c{label:02}", "9"] for label in (8, 17, 26, 35, 44)]
    least = [[f"c{label:02}", "1"] for label in (0, 9, 18, 27, 36)]
    assert page.tables[1:] == [[*most, ["35 classes between", ""], *least]]
    assert "val: images of a class" in page.text and "Each of the 45 classes has 1." in page.text
    assert len(page.charts) == 9
    terminal = capsys.readouterr().out
    assert "train: most images of c08 (9), fewest of c36 (1)" in terminal
    assert "val: 1 image of each of 45 classes" in terminal


def test_one_split_one_class_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images" / "only").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save(tmp_path / "images" / "only" / "1.png")
    convert_folder(tmp_path / "images", tmp_path / "shards")
    page = show(tmp_path / "shards")
    assert page.tables[1] == [["only", "", "1"]]
    assert [image.size for image in page.images] == [(40, 30), (224, 224)]
    assert "1 image of train." in page.text
    assert "images: 1 image, 1 class, " in capsys.readouterr().out


def test_a_set_without_train(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    splits = json.loads((shard_set / "manifest.json").read_text())["splits"]
    shards = copy_of(shard_set, tmp_path / "shards", splits={"val": splits["val"]})
    (shards / "train.beton").unlink()
    page = show(shards)
    assert page.tables[0][0] == ["", "val"] and len(page.images) == 20 and "10 images of val." in page.text
    assert "epoch" not in page.text and "epoch" not in capsys.readouterr().out


def test_the_quarantine_says_how_many_it_does_not_name(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = [("truncated", 125), *((f"reason {chr(65 + i)}", 24 - i) for i in range(24))]
    lines = [
        json.dumps({"split": "train", "file": f"a/{i}.jpg", "reason": reason}) + "\n"
        for reason, count in kinds
        for i in range(count)
    ]
    (shards / "quarantine.jsonl").write_text("".join(lines))
    manifest = json.loads((shards / "manifest.json").read_text())
    manifest["splits"]["train"]["num_quarantined"] = len(lines)
    write_manifest(shards, manifest)
    page, terminal = show(shards, "--images", 0), capsys.readouterr().out
    assert len(lines) == 425
    for text in (page.text, terminal):
        assert "425 images of the source left out." in text
    assert "truncated: 125" in page.text and "train/a/4.jpg" in page.text and "train/a/5.jpg" not in page.text
    assert "and 120 more" in page.text
    assert "reason S: 6" in page.text and "reason T" not in page.text
    assert "And 5 more reasons, for 15 images." in page.text
    assert "  125: truncated\n" in terminal and "  210: 20 more reasons\n" in terminal
    (shards / "quarantine.jsonl").unlink()
    assert "425 images left out, but quarantine.jsonl lists 0." in show(shards, "--images", 0).text


def test_only_the_images_that_are_shown_are_read(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, reader = open_split(shards, "train")
    read: list[int] = []
    encoded = type(reader).encoded

    def watched(self: Any, sample_id: int) -> np.ndarray:
        read.append(int(sample_id))
        return encoded(self, sample_id)

    monkeypatch.setattr(type(reader), "encoded", watched)
    page = show(shards, "--images", 0)
    assert read == [] and page.images == [] and "Contact sheet" not in page.text
    page = show(shards, "--images", 4)
    shown = re.findall(r'alt="sample (\d+)"', page.source)
    assert len(shown) == 4 and set(map(str, read)) == set(shown)


def test_the_seed_decides_the_page(shards: Path) -> None:
    first, again, other = (show(shards, "--seed", seed).source for seed in (1, 1, 2))
    assert first == again != other


def test_damage_is_one_line_and_leaves_the_old_page(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "report.html").write_text("old")
    with (shards / "train.beton").open("r+b") as file:
        file.seek(8_388_608 + 20)
        file.write(bytes(2_000_000))
    assert main([str(shards)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.fullmatch(r"error: .*split 'train': sample \d+: damaged JPEG .*\n", captured.err)
    with (shards / "val.beton").open("r+b") as file:
        file.truncate(1000)
    assert main([str(shards)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and re.fullmatch(r"error: .*val\.beton: 1,000 bytes, not .*\n", captured.err)
    assert (shards / "report.html").read_text() == "old" and not list(shards.glob(".*"))


def test_mistakes_are_one_line(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ([empty], f"error: {empty}: no manifest.json here"),
        ([shards, "--images", "-1"], "error: --images = -1: must be 0 or more"),
        ([shards, "--html", shards / "train.beton"], "error: --html = "),
        (
            [shards, "--html", empty / "no" / "page.html"],
            f"error: {empty}/no/page.html: No such file",
        ),
    ):
        assert main([str(argument) for argument in arguments]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.startswith(message) and captured.err.count("\n") == 1
    for flags in (["--htm", "x.html"], ["--image", "3"], ["--images", "many"], ["--sed", "1"], ["more"]):
        with pytest.raises(SystemExit) as ended:
            main([str(shards), *flags])
        assert ended.value.code == 2
        assert flags[0] in capsys.readouterr().err
    assert not (shards / "report.html").exists() and not list(empty.iterdir())


def test_html_names_the_page(shards: Path, tmp_path: Path) -> None:
    assert main([str(shards), "--images", "0", "--html", str(tmp_path / "other.html")]) == 0
    assert Page(tmp_path / "other.html").tables and not (shards / "report.html").exists()


def test_the_terminals_width_is_respected(
    shards: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    show(shards, "--images", 0)
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["train", "val"])
    table = [line for line in lines[start:] if line.startswith(" ") or "   " in line]
    assert len(table) > 12 and max(map(len, table)) <= 44


def test_as_a_script_without_a_terminal(shard_set: Path, tmp_path: Path) -> None:
    """Plain text, in an encoding that does not have the class names' letters."""
    shards = copy_of(shard_set, tmp_path / "shards", classes=["муравей", "bee", "cow"])
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COLUMNS")}
    done = subprocess.run(
        [sys.executable, SCRIPT, "shards", "--images", "0"],
        cwd=tmp_path,
        env={**environment, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout and "val: most images of ??????? (4)" in done.stdout
    size = (shards / "report.html").stat().st_size
    line, last = done.stdout.splitlines()[-2:]
    assert line == f"shards/report.html: {size:,} bytes" and last.startswith("next: ")
    assert "муравей" in Page(shards / "report.html").text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (54_454, "54.5 kB"), (999_600, "1 MB"), (2.5e12, "2.5 TB")],
)
def test_file_sizes(count: float, text: str) -> None:
    assert file_size(count) == text
