"""`sdpnet lab`: variants, equal compute, rounds, statistics; an experiment end to end, interrupted and continued."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from command_output import one_line
from rich.console import Console
from scipy import stats

from sdpnet import cli
from sdpnet.config.length import with_epochs
from sdpnet.config.load import load_config
from sdpnet.config.names import CONFIG_DIRECTORY
from sdpnet.lab import process, runner
from sdpnet.lab.compute import equally_long, mean_share, training_macs
from sdpnet.lab.experiment import Experiment, read_experiment, trainings_of, write_experiment
from sdpnet.lab.plot import as_svg
from sdpnet.lab.process import run_trainings
from sdpnet.lab.results import Result, comparisons
from sdpnet.lab.runner import epochs_that_fit
from sdpnet.lab.table import as_json, as_table, legend
from sdpnet.lab.variants import Variant, read_variants, variant_from_words, with_unique_names
from sdpnet.model.flops import forward_macs
from sdpnet.pipelines.errors import UserError

CONFIGS = sorted(str(path.relative_to(CONFIG_DIRECTORY).with_suffix("")) for path in CONFIG_DIRECTORY.rglob("*.yaml"))


def experiment(*variants: Variant, **more: Any) -> Experiment:
    fields: dict[str, Any] = {"config": "debug", "data": "/data", "settings": (), "baseline": "debug"}
    return Experiment(**{**fields, "variants": variants or (Variant("qk", ("model.qk_norm=true",)),), **more})


# ---- variants


def test_a_file_and_the_command_line_say_the_same(tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(
        "qk norm: {model.qk_norm: true, optim: {lr: 1e-3}}\n"
        "modern: {config: demo}\n"
        "augment: {augment.mix: {probability: 0.5}, augment.mean: [0.4, 0.5, 0.6]}\n"
    )
    qk, modern, augment = read_variants(path)
    words = ["qk norm", "model.qk_norm=true", 'optim.lr="1e-3"']
    assert qk == variant_from_words(words) and qk.folder == "qk-norm"
    assert modern == variant_from_words(["modern", "config=demo"]) == Variant("modern", (), "demo")
    assert augment.settings == ("augment.mix.probability=0.5", "augment.mean=[0.4, 0.5, 0.6]")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b]", "must map names of variants to settings"),
        ("{", "not valid YAML"),
        ("a: 3", "variant 'a': must be keys and values"),
        ("a/b: {}", "variant 'a/b': a name starts with a letter"),
        ("a: {config: [x]}", "config must be the name or path of a config"),
        ("a: {model.dim: 2026-11-28}", "a value is no number, text or list"),
    ],
)
def test_wrong_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "variants.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_variants(path)


def test_mistakes_are_one_line(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def lab(*words: str) -> int:
        return cli.main(["lab", "--out", str(tmp_path / "lab"), *words])

    whole = ["--config", "debug", "--data", str(shard_set)]
    one_line(lab(), capsys, "holds no experiment to continue")
    one_line(lab(*whole[:2]), capsys, "--data is missing")
    one_line(lab(*whole), capsys, "there is nothing to compare")
    one_line(lab(*whole, "--variant", "model.qk_norm=true"), capsys, "the first word is the variant's name")
    one_line(lab(*whole, "--variant", "qk"), capsys, "changes nothing")
    one_line(lab(*whole, "--variant", "qk", "norm"), capsys, "must look like NAME KEY=VALUE")
    one_line(lab(*whole, "--variant", "qk", "model.qknorm=true"), capsys, "variant 'qk'", "did you mean 'qk_norm'")
    one_line(lab(*whole, "--variant", "debug", "model.dim=32"), capsys, "variant 'debug': there is 'debug' already")
    one_line(lab(*whole, "--variant", "a", "model.dim=32", "--seeds", "0"), capsys, "--seeds = 0")
    one_line(lab(*whole, "--variant", "a", "model.dim=32", "--jobs", "0"), capsys, "--jobs = 0")
    assert not (tmp_path / "lab").exists()
    with pytest.raises(UserError, match="there is 'a b' already"):
        with_unique_names([Variant("a b"), Variant("a-b")])


# ---- the same recipe with other epochs, and equal compute


@pytest.mark.parametrize("name", CONFIGS)
def test_every_recipe_keeps_its_shape_in_any_length(name: str) -> None:
    config = load_config(name)
    assert with_epochs(config, config.train.epochs) is config
    for epochs in (1, 2, 3, 7, 2 * config.train.epochs):
        other = with_epochs(config, epochs)
        assert other.train.epochs == epochs
        share = epochs / config.train.epochs
        assert other.optim.warmup_epochs == pytest.approx(config.optim.warmup_epochs * share)
        if config.ema.decay and share > 0.01:
            assert (1 - other.ema.decay) * share == pytest.approx(1 - config.ema.decay)
        if epochs > 1 and config.resolution.start_size:
            assert abs(other.resolution.end_epoch - config.resolution.end_epoch * share) <= 0.5


def test_compute_counts_small_images_and_dropped_patches() -> None:
    growing = ["resolution.start_size=32", "resolution.end_epoch=2", "resolution.multiple=16", "train.epochs=4"]
    config = load_config("debug", [*growing, "model.patch_dropout=0.5", "train.full_patch_epochs=1"])
    options = config.model.options(10)
    epochs = [(32, 0.5), (48, 0.5), (64, 0.5), (64, 0.0)]
    assert training_macs(config, 10) == 3 * sum(forward_macs(options, *epoch) for epoch in epochs)
    last = 3 * forward_macs(options, 64)
    assert mean_share(config, 10) == pytest.approx(training_macs(config, 10) / 4 / last)


def test_what_is_equal() -> None:
    base = load_config("debug", ["train.epochs=40"])
    wide = load_config("debug", ["train.epochs=12", "model.dim=128", "model.head_hidden=128"])
    assert equally_long(wide, base, "epochs", 1.0, 10).train.epochs == 40
    assert equally_long(wide, base, "own", 0.5, 10).train.epochs == 6
    equal = equally_long(wide, base, "compute", 1.0, 10)
    assert training_macs(equal, 10) == pytest.approx(training_macs(base, 10), rel=0.05) and equal.train.epochs < 20
    assert equally_long(wide, base, "compute", 0.001, 10).train.epochs == 1


# ---- rounds


def test_successive_halving() -> None:
    names = [f"v{number}" for number in range(5)]
    halving = experiment(*(Variant(name, ("optim.lr=2e-3",)) for name in names), rounds=3, epochs=8, equal="epochs")
    assert [halving.configs(10, round)["debug"].train.epochs for round in range(3)] == [2, 4, 8]
    scores = {"v0": 0.1, "v1": -0.2, "v2": 0.3, "v3": 0.0}  # v4 failed
    assert halving.survivors(scores) == ["debug", "v0", "v2"]
    assert halving.survivors({"v2": -0.1}) == ["debug", "v2"] and halving.survivors({}) == ["debug"]
    trainings = list(trainings_of(halving, 1, ["debug", "v2"], 10, Path("/lab")))
    assert [(one.variant, one.seed) for one in trainings] == [(n, s) for s in range(3) for n in ("debug", "v2")]
    assert {one.compute for one in trainings} == {0.5} and trainings[1].config.seed == 0
    assert trainings[1].directory == Path("/lab/runs/v2-4ep-seed0")
    assert trainings[0].config.train.eval_interval == 4


def test_epochs_for_the_time() -> None:
    """14 trainings in two rounds: 2 x 4 of half and 2 x 3 of the whole length, 10 s of everything else for each."""
    variants = [Variant(name, ("optim.lr=2e-3",)) for name in ("a", "b", "c")]
    one = experiment(*variants, rounds=2, seeds=2, equal="epochs", settings=("train.epochs=50",))
    needed = 14 * 10 + 1.08 * 3 * 7 * (8 / 2 + 6)
    assert epochs_that_fit(one, 10, needed + 1, 3.0, 10.0) == 7
    assert epochs_that_fit(one, 10, 1e6, 3.0, 10.0) == 50
    with pytest.raises(UserError, match=r"14 trainings of one epoch take about 2\.9 minutes, and 1\.7 are left"):
        epochs_that_fit(one, 10, 100, 3.0, 10.0)


# ---- statistics


def results(scores: dict[str, list[float]], **more: Any) -> list[Result]:
    return [
        Result(name, seed, more.get("round", 0), 4, 1.0, f"runs/{name}", {"top1": 0.5, "ema_top1": score}, 60.0)
        for name, values in scores.items()
        for seed, score in enumerate(values)
    ]


def test_differences_have_the_standard_errors_of_paired_samples() -> None:
    scores = {"base": [0.30, 0.33, 0.29, 0.31], "good": [0.34, 0.36, 0.30, 0.36], "bad": [0.2, 0.34, 0.1, 0.1]}
    base, good, bad = comparisons(results(scores), "base")
    assert [base.variant, good.variant, bad.variant] == ["base", "good", "bad"] and not base.differences
    for row in (good, bad):
        paired = stats.ttest_rel(scores[row.variant], scores["base"])
        assert row.difference / row.error == pytest.approx(paired.statistic)
        assert row.mean_error == pytest.approx(stats.sem(scores[row.variant]))
    assert (good.better, bad.better) == (4, 1)


def test_missing_failed_and_single_trainings() -> None:
    some = results({"base": [0.3], "one": [0.4, 0.5]})
    failed = replace(some[0], variant="failed", scores={}, failure="status 2: no")
    base, one, none = comparisons([*some, failed], "base")
    assert one.differences == (pytest.approx(0.1),) and math.isnan(one.error)
    assert none.failures == 1 and not none.top1 and math.isnan(none.difference)
    later = [*some, *results({"base": [0.6], "one": [0.7]}, round=1)]
    assert [(row.round, row.differences) for row in comparisons(later, "base")] == [
        (1, ()),
        (1, (pytest.approx(0.1),)),
    ]
    text = as_json(experiment(), [*some, failed], [base, one, none], {"commit": "abc"}).decode()
    assert json.loads(text)["table"][1]["error"] is None and json.loads(text)["commit"] == "abc"


def test_the_table_reads_well() -> None:
    scores = {"debug": [0.3012, 0.3102], "qk": [0.3412, 0.3322]}
    one = experiment(seeds=3)
    console = Console(width=80, record=True, file=StringIO())
    console.print(as_table(comparisons(results(scores), "debug"), one))
    lines = [line.split() for line in console.export_text().splitlines() if line.strip()]
    assert lines[0] == ["variant", "epochs", "cost", "seconds", "top-1,", "%", "points", "more", "better"]
    assert lines[-2] == ["debug", "4", "1.00", "60", "30.57", "±", "0.45"]
    assert lines[-1] == ["qk", "4", "1.00", "60", "33.67", "±", "0.45", "+3.10", "±", "0.90", "2/2"]
    assert legend(one, 2).startswith("2 of 3 seeds; ± is one standard error")
    assert legend(one, 1).startswith("1 of 3 seeds; one seed gives no standard error")


# ---- the drawing


def test_the_drawing_has_each_difference_at_its_place() -> None:
    scores = {"debug": [0.30, 0.31], "qk norm": [0.34, 0.33], "worse": [0.28, 0.28]}
    rows = comparisons(results(scores), "debug")
    svg = ElementTree.fromstring(as_svg(rows, experiment(Variant("qk norm"), Variant("worse"))))
    names = {"svg": "http://www.w3.org/2000/svg"}
    texts = [text.text or "" for text in svg.iterfind(".//svg:text", names)]
    assert texts[0] == "debug: 30.50 % top-1 after 4 epochs, 2 seeds" and texts[-1] == "points of top-1 more than debug"
    ticks = {
        float(text): float(one.get("x", ""))
        for text, one in zip(texts, svg.iterfind(".//svg:text", names), strict=True)
        if text == "0" or (text[:1] in "+-" and "±" not in text)
    }
    assert sorted(ticks) == [-4, -2, 0, 2, 4]
    per_point = (max(ticks.values()) - min(ticks.values())) / (max(ticks) - min(ticks))
    for row, group in zip(rows[1:], svg.iterfind(".//svg:g/svg:g", names), strict=True):
        *seeds, mean = [float(one.get("cx", "")) for one in group.iterfind("svg:circle", names)]
        expected = [ticks[0] + 100 * value * per_point for value in row.differences]
        assert seeds == pytest.approx(expected, abs=0.11)
        assert mean == pytest.approx(ticks[0] + 100 * row.difference * per_point, abs=0.11)
        assert group.findtext("svg:title", namespaces=names) == row.variant
    assert "+3.00 ± 1.00" in texts and "-2.50 ± 0.50" in texts


@pytest.mark.parametrize(
    "scores",
    [
        {"debug": [0.3]},
        {"debug": [0.3, 0.4], "x" * 60: [0.3, 0.4]},
        {"debug": [0.3], "same": [0.3]},
        {"one": [0.5]},
        {},
    ],
)
def test_a_drawing_of_little(scores: dict[str, list[float]]) -> None:
    svg = as_svg(comparisons(results(scores), "debug"), experiment())
    ElementTree.fromstring(svg)
    assert "nan" not in svg


# ---- processes


def test_the_experiment_is_kept(tmp_path: Path) -> None:
    one = experiment(Variant("a b", ("optim.lr=1e-3",), "demo"), rounds=2, epochs=5, equal="own")
    write_experiment(tmp_path, one)
    assert read_experiment(tmp_path) == one
    (tmp_path / "lab.yaml").write_text("config: 3\n")
    with pytest.raises(UserError, match="cannot be read as an experiment"):
        read_experiment(tmp_path)


def test_so_many_at_a_time_in_their_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trainings = list(trainings_of(experiment(epochs=1), 0, ["debug", "qk"], 10, tmp_path))
    begun: list[float] = []

    def start(training: Any, jobs: int) -> subprocess.Popen[bytes]:
        begun.append(time.monotonic())
        return subprocess.Popen([sys.executable, "-S", "-c", f"raise SystemExit({training.seed})"])

    monkeypatch.setattr(process, "_start", start)
    ended: list[tuple[str, int, int]] = []

    def end(training: Any, status: int, seconds: float) -> None:
        assert len(begun) - len(ended) <= 2
        ended.append((training.variant, training.seed, status))

    run_trainings(trainings, 2, end, lambda training: training.seed < 2)
    assert sorted(ended) == [("debug", 0, 0), ("debug", 1, 1), ("qk", 0, 0), ("qk", 1, 1)]


SMALL = ["data.image_size=32", "data.batch_size_per_gpu=4", "data.num_workers=1", "data.pipeline=torchvision"]


def test_an_experiment_and_its_extension(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lab"
    words = ["lab", "--out", str(out), "--config", "debug", "--data", str(shard_set), "--seeds", "1", "--epochs", "1"]
    qk = ["--variant", "qk norm", "model.qk_norm=true"]
    assert cli.main([*words, *SMALL, *qk]) == 0
    printed = capsys.readouterr().out
    assert "[1/2] debug, seed 0, 1 epoch: top-1 " in printed and "[2/2] qk norm, seed 0" in printed
    assert "one seed gives no standard error" in printed
    last = printed.splitlines()[-1]
    assert last.startswith("next: ") and last.endswith(
        f"report {out}/runs/debug-1ep-seed0 {out}/runs/qk-norm-1ep-seed0"
    )
    first = json.loads((out / "lab.json").read_text())
    assert [row["variant"] for row in first["table"]] == ["debug", "qk norm"]
    scores = [
        line for line in (out / "runs/qk-norm-1ep-seed0/metrics.jsonl").read_text().splitlines() if "top1" in line
    ]
    assert first["results"][1]["scores"]["top1"] == json.loads(scores[-1])["top1"]
    assert (first["results"][0]["compute"], first["results"][1]["failure"]) == (1.0, "")

    assert cli.main(["lab", "--out", str(out)]) == 0  # nothing is left to do
    assert "2 of 2 trainings are there already" in capsys.readouterr().out
    again = json.loads((out / "lab.json").read_text())
    assert again["results"] == first["results"]

    # A variant that fails (a batch larger than the split) does not end the others; a changed one is refused.
    assert cli.main([*words, *SMALL, *qk, "--variant", "large", "data.batch_size_per_gpu=500"]) == 0
    assert "large, seed 0, 1 epoch: failed after" in capsys.readouterr().out
    changed = ["--variant", "qk norm", "model.qk_norm=true", "optim.lr=2e-3"]
    one_line(cli.main([*words, *SMALL, *changed]), capsys, "was trained with", "remove it to train it again")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_and_continued(number: signal.Signals, shard_set: Path, tmp_path: Path) -> None:
    """The training saves a checkpoint even if the lab is killed, and then goes on from there."""
    out = tmp_path / "lab"
    words = [sys.executable, "-m", "sdpnet.cli", "lab", "--out", str(out)]
    all_words = [*words, "--config", "debug", "--data", str(shard_set), "--seeds", "1", "--epochs", "200", *SMALL]
    all_words += ["--variant", "qk", "model.qk_norm=true"]
    metrics = out / "runs" / "debug-200ep-seed0" / "metrics.jsonl"
    lab = subprocess.Popen(all_words, stdout=subprocess.DEVNULL)
    while not (metrics.is_file() and metrics.read_text().count("\n") > 5):
        assert lab.poll() is None
        time.sleep(0.1)
    lab.send_signal(number)
    assert lab.wait(60) == (-9 if number == signal.SIGKILL else 130 if number == signal.SIGINT else 143)
    log = out / "runs" / "debug-200ep-seed0.log"
    ends = time.monotonic() + 60
    while "continues exactly there" not in log.read_text():
        assert time.monotonic() < ends, log.read_text()
        time.sleep(0.1)
    lab = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    ends = time.monotonic() + 120
    while "resumed from" not in log.read_text():
        assert lab.poll() is None and time.monotonic() < ends, log.read_text()
        time.sleep(0.1)
    lab.terminate()
    assert lab.wait(60) == 143


class Imagined:
    """Trainings that take no time: an epoch is a second, and everything else of a training ten."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[tuple[str, int, int]] = []
        self.now = 1000.0
        monkeypatch.setattr(runner, "run_trainings", self.run)
        monkeypatch.setattr(runner.time, "monotonic", lambda: self.now)

    def run(self, trainings: Any, jobs: int, ended: Any, proceed: Any = lambda training: True) -> None:
        for training in trainings:
            if not proceed(training):
                return
            epochs = training.config.train.epochs
            self.begun.append((training.directory.name, training.seed, epochs))
            training.directory.mkdir(parents=True)
            (training.directory / "config.yaml").write_text(training.config_text)
            steps = [{"epoch": epoch, "step": epoch, "step_ms": 1000.0} for epoch in range(epochs)]
            top1 = 0.3 + 0.1 * (training.variant != "debug") + 0.01 * training.seed
            lines = [*steps, {"epoch": epochs, "step": epochs, "top1": top1}]
            (training.directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            (training.directory / "model.json").write_text("{}")
            self.now += epochs + 10
            ended(training, 0, float(epochs + 10))


def test_minutes_choose_the_epochs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imagined = Imagined(monkeypatch)
    one = experiment(seeds=2, settings=("train.epochs=50",), equal="epochs")
    lab = runner.Runner(tmp_path, one, 10, seconds=240)
    lab.choose_epochs()
    assert imagined.begun == [("pilot", 0, 2)] and not (tmp_path / "runs" / "pilot").exists()
    # 228 s are left; each of four trainings takes 11 s (an epoch of the pilot counts as its start) and 1.08 s an epoch
    assert lab.experiment.epochs == 42
    assert lab.run() and imagined.now <= 1000 + 240
    assert {epochs for _, _, epochs in imagined.begun[1:]} == {42} and read_experiment(tmp_path).epochs == 42
    base, qk = lab.save()
    assert base.seconds == 42.0 * 1 and qk.differences == (pytest.approx(0.1), pytest.approx(0.1)) and qk.error < 1e-9


def test_no_training_starts_that_does_not_end_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imagined = Imagined(monkeypatch)
    one = experiment(seeds=3, epochs=20, equal="epochs")
    assert not runner.Runner(tmp_path, one, 10, seconds=100).run()
    assert imagined.begun == [("debug-20ep-seed0", 0, 20), ("qk-20ep-seed0", 0, 20), ("debug-20ep-seed1", 1, 20)]
    assert runner.Runner(tmp_path, one, 10).run()
    assert len(imagined.begun) == 6


def test_rounds_take_the_better_half(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    imagined = Imagined(monkeypatch)
    variants = [Variant(name, ("optim.lr=2e-3",)) for name in ("a", "b", "c")]
    assert runner.Runner(tmp_path, experiment(*variants, seeds=1, rounds=2, epochs=4, equal="epochs"), 10).run()
    names = [name for name, _, _ in imagined.begun]
    assert names[:4] == ["debug-2ep-seed0", "a-2ep-seed0", "b-2ep-seed0", "c-2ep-seed0"]
    assert names[4:] == ["debug-4ep-seed0", "a-4ep-seed0", "b-4ep-seed0"]
    table = json.loads((tmp_path / "lab.json").read_text())["table"]
    assert [(row["variant"], row["round"]) for row in table] == [("debug", 1), ("a", 1), ("b", 1), ("c", 0)]
