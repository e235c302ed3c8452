"""`sdpnet report`: what it reads of runs, its figures, the page and the terminal."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_source import figures as figures_of
from page_source import require_self_contained, without_library

from sdpnet import cli
from sdpnet.commands import report as run_report
from sdpnet.commands.report import page_path
from sdpnet.config.load import dump_config, load_config
from sdpnet.reporting import finished_run
from sdpnet.reporting.run_metrics import Run, config_differences, figures, read_runs
from sdpnet.reporting.run_page import page, summary


def training(step: int, loss: float, epoch: int = 0, **more: float) -> dict[str, Any]:
    measured = {"images_per_second": 100.0 + step, "data_wait_fraction": 0.25}
    return {"epoch": epoch, "step": step, "train_loss": loss, "lr": 1e-3, "grad_norm": 1.0, **measured, **more}


def evaluation(step: int, epoch: int, top1: float, **more: float) -> dict[str, Any]:
    return {"epoch": epoch, "step": step, "top1": top1, "top5": top1 + 0.1, "val_loss": 2.0, **more}


def write(directory: Path, lines: Iterable[dict[str, Any]], *settings: str) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(dump_config(load_config("debug", settings)))
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def two_epochs() -> list[dict[str, Any]]:
    return [
        training(5, 3.0),
        training(10, 2.5),
        evaluation(10, 0, 0.5, ema_top1=0.25, ema_top5=0.5, ema_val_loss=2.5),
        training(15, 2.0, 1),
        training(20, 1.5, 1),
        evaluation(20, 1, 0.4, ema_top1=0.625, ema_top5=0.75, ema_val_loss=1.5),
    ]


def read(directory: Path) -> Run:
    (run,) = read_runs([directory])
    return run


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    run = read(write(tmp_path / "run", two_epochs(), "optim.lr=0.5"))
    assert run.name == "run" and not run.finished and run.unreadable == 0 and run.last_step == 20
    assert run.series["train_loss"].steps.tolist() == [5, 10, 15, 20]
    assert run.series["train_loss"].values.tolist() == [3, 2.5, 2, 1.5]
    assert run.series["ema_top1"].values.tolist() == [0.25, 0.625] and "epoch" not in run.series
    assert run.config["optim.lr"] == 0.5 and run.config["data.crop.scale"] == [0.08, 1.0]
    assert run.epochs_at(np.array([0, 5, 10, 15, 20, 25])).tolist() == [0, 0.5, 1, 1.5, 2, 2.5]


def test_epochs_where_their_length_changed(tmp_path: Path) -> None:
    """Ten steps an epoch, then, after a resume with twice the GPUs, five; evaluations every second epoch."""
    run = read(write(tmp_path / "run", [evaluation(20, 1, 0.1), evaluation(30, 3, 0.2), training(35, 1.0)]))
    assert run.epochs_at(np.array([10.0, 20, 25, 30, 35])).tolist() == [1, 2, 3, 4, 5]


def test_minutes_are_those_of_the_steps(tmp_path: Path) -> None:
    """Five steps of 6 s, five of 12 s, five that are not known, which count as those after them, and five of 3 s."""
    lines = [training(5, 3.0, step_ms=6000.0), training(10, 3.0, step_ms=12_000.0), training(15, 3.0)]
    run = read(write(tmp_path / "run", [*lines, training(20, 3.0, step_ms=3000.0), evaluation(22, 0, 0.5)]))
    assert run.minutes_at(np.array([0.0, 5, 7.5, 10, 20, 22])) == pytest.approx([0, 0.5, 1.0, 1.5, 2.0, 2.1])
    assert run.has_times and not read(write(tmp_path / "other", two_epochs())).has_times


def test_several_runs_are_compared_over_time(tmp_path: Path) -> None:
    slow, fast = (
        read(write(tmp_path / name, [training(10, 3.0, step_ms=ms), evaluation(10, 0, 0.5)]))
        for name, ms in (("slow", 12_000.0), ("fast", 6000.0))
    )
    assert "Top-1 over time" not in page([slow]) and "Top-1 over time" in page([slow, fast])
    unknown = read(write(tmp_path / "unknown", two_epochs()))
    assert "Top-1 over time" not in page([slow, unknown])


def test_figures(tmp_path: Path) -> None:
    directory = write(tmp_path / "run", two_epochs(), "train.epochs=3")
    (directory / "model.safetensors").touch()
    told = dict(figures(read(directory)))
    assert {name: text for name, text in told.items() if text != "-"} == {
        "state": "finished",
        "epochs": "2 of 3",
        "steps": "20",
        "training loss, last": "1.5000",
        "validation loss, last": "2.0000",
        "top-1, last": "40.00%",
        "top-5, last": "50.00%",
        "top-1, best": "50.00% (epoch 1)",
        "EMA: validation loss, last": "1.5000",
        "EMA: top-1, last": "62.50%",
        "EMA: top-5, last": "75.00%",
        "EMA: top-1, best": "62.50% (epoch 2)",
        "images/s, median": f"{statistics.median([105, 110, 115, 120]):,.0f}",
        "waiting for data, median": "25.0%",
    }


def damaged(directory: Path) -> Path:
    """Lines cut short, of other kinds and in another order; values that are not finite or no numbers."""
    write(directory, [training(10, math.nan), training(5, math.inf, remark=True), evaluation(10, 0, math.nan)])
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(b'[1, 2]\n{"epoch": 1}\n{"step": "x"}\n{"step": NaN}\n"step"\n\n\xff\n{"epoch": 1, "step": 15, "tr')
    return directory


def test_lines_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    run = read(damaged(tmp_path / "run"))
    assert run.unreadable == 8 and run.series["train_loss"].steps.tolist() == [5, 10]
    assert dict(figures(run))["lines that cannot be read"] == "8"
    assert dict(figures(run))["training loss, last"] == "nan" and dict(figures(run))["top-1, best"] == "-"
    assert "remark" not in run.series


def test_only_the_keys_that_differ(tmp_path: Path) -> None:
    one = write(tmp_path / "one", [])
    other = write(tmp_path / "other", [], "optim.lr=0.5", "model.mlp_ratio=2", "data.crop.scale=[0.5, 1]")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").touch()
    runs = read_runs([one, other, bare])
    assert config_differences(runs) == [
        ("data.crop.scale", ["[0.08, 1.0]", "[0.5, 1.0]", "-"]),
        ("optim.lr", ["0.001", "0.5", "-"]),
        ("model.mlp_ratio", ["-", "2", "-"]),
    ]
    assert config_differences(runs[:1]) == config_differences(runs[::2]) == []


class Reader(HTMLParser):
    """The page's text, and what would be fetched or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.outside: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [name for name, _ in attributes if name in ("src", "href", "srcset") or name.startswith("on")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def thousands(directory: Path) -> Path:
    lines = [training(step, 3.0 + step % 7, gpu_memory_gb=10.5, step_ms=5.0) for step in range(1, 5_000)]
    return write(directory, [*lines, evaluation(5_000, 0, 0.5)])


def nothing(directory: Path) -> Path:
    (write(directory, []) / "metrics.jsonl").unlink()
    return directory


@pytest.mark.parametrize(
    "make",
    [
        lambda path: write(path, two_epochs()),
        lambda path: write(path, [training(1, 2.0)]),
        lambda path: write(path, [evaluation(0, 0, 0.5)]),
        lambda path: write(path, []),
        nothing,
        damaged,
        thousands,
    ],
    ids=["two epochs", "one point", "step 0", "empty", "no metrics", "damaged", "thousands"],
)
def test_the_page_needs_nothing_else(make: Any, tmp_path: Path) -> None:
    run = read(make(tmp_path / "run"))
    text = page([run])
    require_self_contained(text)
    reader = Reader(text)
    assert "http" not in re.sub("http-equiv", "", without_library(text))
    assert reader.outside == [] and not {"link", "img", "iframe"} & set(reader.tags)
    shown = {chart for chart in ("Training loss", "Top-1", "GPU memory", "Step") if chart in reader.text}
    keys = {"Training loss": "train_loss", "Top-1": "top1", "GPU memory": "gpu_memory_gb", "Step": "step_ms"}
    assert shown == {chart for chart, key in keys.items() if key in run.series}
    charts = len(set(run.series) - {name for name in run.series if name.startswith("ema_")})
    assert len(figures_of(text)) == reader.tags.count("figure") == reader.text.count("Values") == charts
    assert len(without_library(text)) < 700_000 and len(text) < 3_000_000


def test_runs_side_by_side(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "run", two_epochs())
    second = write(tmp_path / "b" / "run", [training(5, 2.0)], "optim.lr=0.5")
    runs = read_runs([first, second])
    assert [run.name for run in runs] == [str(first), str(second)], "names alike are told apart"
    reader = Reader(page(runs))
    assert "2 runs" in reader.text and "optim.lr" in reader.text and "optim.eps" not in reader.text
    assert "step 5" in reader.text and "epoch 1" not in reader.text, "one of them has no evaluation yet"
    assert dict(summary(runs))["top-1, last"] == ["40.00%", "-"]
    same = Reader(page([runs[0], runs[0]]))
    assert "The configs are the same." in same.text and "epoch 2" in same.text


def test_many_runs_have_colours_of_their_own(tmp_path: Path) -> None:
    directories = [write(tmp_path / f"run{index}", [training(1, float(index))]) for index in range(20)]
    text = page(read_runs(directories))
    (loss, *_) = figures_of(text)
    colours = [trace["line"]["color"] for trace in loss["data"]]
    assert len(set(colours)) == 20 and all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in colours)
    assert re.findall(r'class="swatch" style="background: (#[0-9a-f]{6})"', text)[:20] == colours


def test_names_and_values_are_text(tmp_path: Path) -> None:
    run = read(write(tmp_path / "<b>\u202e&\n", two_epochs(), "data.path=<script>"))
    other = read(write(tmp_path / "other", two_epochs()))
    reader = Reader(page([run, other]))
    assert "b" not in reader.tags and "<script>" in reader.text and r"<b>\u202e&\n" in reader.text
    require_self_contained(page([run, other]))
    (loss, *_) = figures_of(page([run, other]))
    assert loss["data"][0]["name"] == r"&lt;b&gt;\u202e&amp;\n"


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    first = write(tmp_path / "first", two_epochs())
    second = write(tmp_path / "second", [], "optim.lr=0.5")
    assert cli.main(["report", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    rows = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    assert (
        ["first", "second"] in rows and ["top-1, last", "40.00%", "-"] in rows and ["optim.lr", "0.001", "0.5"] in rows
    )
    compared = first / "report-first-vs-second.html"
    assert f"\n{compared}: {compared.stat().st_size:,} bytes\n" in out
    assert compared.read_text(encoding="utf-8") == page(read_runs([first, second]))
    assert not (first / "report.html").exists()
    assert cli.main(["report", str(second), "--out", str(tmp_path / "page.html")]) == 0
    assert Reader((tmp_path / "page.html").read_text()).text and not (second / "report.html").exists()


def test_no_page_takes_anothers_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (write(tmp_path / parent / "run", two_epochs()) for parent in ("a", "b", "c"))
    long = [write(tmp_path / f"{index}{'猫' * 60}", []) for index in range(4)]
    odd = write(tmp_path / "odd\x1b[2J\n", two_epochs())
    compared = [[a], [a, b], [a, c], [a, b, c], [a, *long], [a, *long[:3]], [a, odd], [a, a]]
    pages = set()
    for runs in compared:
        assert cli.main(["report", *map(str, runs)]) == 0
        page_of = page_path(runs)
        assert page_of.parent == a and page_of.read_text(encoding="utf-8") == page(read_runs(runs))
        pages.add(page_of)
    assert len(pages) == len(compared)
    out = capsys.readouterr().out
    assert "\x1b" not in out and r"report-run-vs-odd\x1b[2J\n.html" in out


def last(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out.splitlines()[-1]


def test_what_comes_next(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (run_report, finished_run):
        monkeypatch.setattr(module, "sdpnet", lambda *words: ("sdpnet", *words))
    monkeypatch.chdir(tmp_path)
    worse = [training(5, 3.0), evaluation(10, 0, 0.1)]
    first = write(Path("first"), worse, "data.path=my shards")
    second = write(Path("second"), two_epochs(), "data.path=my shards")
    assert cli.main(["report", "first", "second"]) == 0
    assert last(capsys) == "next: sdpnet train --resume --out first"
    (first / ".lock").touch()
    assert cli.main(["report", "first", "second"]) == 0
    assert last(capsys) == "next: sdpnet train --resume --out second"
    assert cli.main(["report", "first"]) == 0
    assert "next:" not in capsys.readouterr().out
    for run in (first, second):
        (run / "model.safetensors").touch()
    monkeypatch.setattr(finished_run, "find_spec", lambda name: None)
    assert cli.main(["report", "first", "second"]) == 0
    assert last(capsys) == "next: sdpnet export --model second --format torch-export --out second/model.pt2"
    monkeypatch.setattr(finished_run, "find_spec", lambda name: name)
    assert cli.main(["report", "first"]) == 0
    assert last(capsys) == "next: sdpnet export --model first --format onnx --out first/model.onnx"
    Path("my shards").mkdir()
    Path("my shards", "manifest.json").touch()
    assert cli.main(["report", "first", "second"]) == 0
    assert last(capsys) == "next: sdpnet evaluate --model second --data 'my shards'"


def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    broken = write(tmp_path / "broken", [])
    (broken / "config.yaml").write_text("a: [")
    run = write(tmp_path / "run", [])
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "manifest.json").touch()
    for arguments, message in (
        ([tmp_path / "empty"], "empty: no run: neither config.yaml nor metrics.jsonl"),
        ([tmp_path / "absent"], "absent: no run"),
        ([tmp_path / "runn"], f"it is not there; did you mean {run}?"),
        ([run / "config.yaml"], "a file; give the folder of a run"),
        ([shards], "a shard set, which sdpnet describe shows"),
        ([broken], "config.yaml: not a config"),
        ([run, "--out", tmp_path / "page.pdf"], "page.pdf': must be the name of an .html file"),
        ([run, "--out", tmp_path / "nowhere" / "page.html"], "No such file or directory"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_a_line_that_a_killed_run_repeated_counts_once(tmp_path: Path) -> None:
    lines = two_epochs()
    run = read(write(tmp_path / "run", [*lines[:3], evaluation(10, 0, 0.75), *lines[3:]]))
    assert run.series["top1"].steps.tolist() == [10, 20] and run.series["top1"].values.tolist() == [0.75, 0.4]
    assert run.epoch_ends.tolist() == [[0, 0], [10, 1], [20, 2]]


HUGE = [1e308, -1e308, 10**400, -(10**400), 2**70, 1e-320, 5e-324, math.nan, math.inf, -math.inf, 3e38]


@pytest.mark.parametrize(
    "first", HUGE, ids=[f"{value:.9}"[:9] if isinstance(value, float) else "int" for value in HUGE]
)
def test_huge_and_tiny_values_are_drawn_or_counted_as_not_finite(first: float, tmp_path: Path) -> None:
    lines = [training(step, first if step % 2 else value) for step, value in enumerate(HUGE, 1)]
    lines += [{**evaluation(20, 2**70, 0.5), "top1": first, "ema_top1": first}, evaluation(22, 2, 1.0)]
    directory = write(tmp_path / "run", lines)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1e308, "top1": 1}\n{"step": [[[[]]]]}\n' + '{"step": 1, "x": ' + "[" * 100_000 + "\n")
    run = read(directory)
    assert run.unreadable == 3 and run.last_step == 22
    assert cli.main(["report", str(directory)]) == 0
    text = (directory / "report.html").read_text()
    require_self_contained(text)
    assert "not finite" in text and len(figures_of(text)) == 8
