"""`./dev gpu`: what it does in how many minutes, what it says of how parts ended, and a rehearsal of the parts."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_output import one_line

from sdpnet.config.load import load_config
from sdpnet.gpu_checks import __main__ as command
from sdpnet.gpu_checks import checks
from sdpnet.gpu_checks.checks import gpu_test_files
from sdpnet.gpu_checks.measurements import CONVERSION
from sdpnet.gpu_checks.part import Outcome, Part, Settings, size_for
from sdpnet.gpu_checks.process import run_limited
from sdpnet.gpu_checks.programs import data_path, fused, kernels
from sdpnet.gpu_checks.programs.accuracy import epochs_that_fit, parse_recipes
from sdpnet.gpu_checks.programs.kernels import Kernel, by_part, launches, part_of
from sdpnet.gpu_checks.programs.prediction import comparison
from sdpnet.gpu_checks.programs.resume import difference
from sdpnet.gpu_checks.programs.shards import repeated
from sdpnet.gpu_checks.results import done_before, verdict, write_results
from sdpnet.gpu_checks.schedule import chosen, limit_of
from sdpnet.pipelines.augment import DeviceStage
from sdpnet.pipelines.errors import UserError
from sdpnet.pipelines.loader import make_loader
from sdpnet.pipelines.options import ShardOptions

ROOT = Path(__file__).resolve().parents[2]
ALL = [part.name for part in command.PARTS]
RECIPE_RUNS = "accuracy"


# ---- which parts fit into the time


def test_what_fits_into_4_10_and_30_minutes() -> None:
    parts = [CONVERSION, *command.PARTS]
    fits = {minutes: chosen(parts, 60 * minutes, size_for(minutes)) for minutes in (4, 10, 30)}
    assert fits[4] == ["shards", "fused", "pixels", "resume", "step", "kernels", "depthwise"]
    assert set(ALL) - set(fits[10]) == {"host", "augment", RECIPE_RUNS}
    assert fits[30] == ["shards", *ALL]
    for minutes, names in fits.items():
        expected = sum(part.expected(size_for(minutes)) for part in parts if part.name in names)
        assert expected <= 60 * minutes
    assert [part.rank for part in sorted(parts, key=lambda part: part.rank)] == list(range(len(parts)))
    assert all(part.is_check for part in parts if part.rank in (1, 2)), "what is worth most is correctness"


def test_the_documents_say_what_fits() -> None:
    text = (ROOT / "docs" / "benchmarks" / "measure.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert [row[0].strip("`") for row in rows] == ALL
    for column, minutes in enumerate((4, 10, 30), 2):
        fits = chosen([CONVERSION, *command.PARTS], 60 * minutes, size_for(minutes))
        assert [row[0].strip("`") for row in rows if row[column]] == fits[1:]


def test_a_part_is_stopped_before_the_time_is_over() -> None:
    part = next(part for part in command.PARTS if part.name == "kernels")
    assert part.expected("short") == 40
    assert limit_of(part, 1000, "short") == 40 * 1.6 + 10
    assert limit_of(part, 45, "short") == 40, "what is left, less what the end needs"
    assert limit_of(part, 20, "short") == 0, "less than half of what it takes"


def test_a_command_that_takes_too_long_ends_with_all_its_processes(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time; subprocess.Popen(['sleep', '77.25']); print('begun', flush=True); time.sleep(60)"
    )
    began = time.monotonic()
    assert run_limited(["-c", code], tmp_path / "log", 3) is None
    assert time.monotonic() - began < 30 and "begun" in (tmp_path / "log").read_text()
    running = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not any(b"77.25" in words and words.startswith(b"sleep") for words in running)
    assert run_limited(["-c", "import sdpnet; raise SystemExit(3)"], tmp_path / "log", 60) == 3


# ---- results


def outcome(part: str, status: Any, *, is_check: bool = True) -> Outcome:
    return Outcome(part, status, is_check, 1.5, "figures")


def test_the_verdict_is_about_checks_alone() -> None:
    assert verdict([outcome("a", "passed"), outcome("b", "failed", is_check=False)]) == (True, "correct: a")
    assert verdict([outcome("a", "passed"), outcome("b", "left out")]) == (True, "correct: a; not checked: b")
    assert verdict([outcome("a", "passed"), outcome("b", "failed"), outcome("c", "cut off")]) == (
        False,
        "NOT CORRECT, or not shown to be: b, c",
    )
    assert verdict([outcome("a", "not possible")]) == (True, "nothing was checked; not checked: a")


def test_what_is_done_is_known_to_the_next_run(tmp_path: Path) -> None:
    file, settings = tmp_path / "results.json", {"device": "cuda", "data": "a"}
    assert done_before(file, settings) == {}
    rows = [outcome("a", "passed"), outcome("b", "cut off"), outcome("c", "failed"), outcome("d", "left out")]
    write_results(file, settings, {"gpu": "a card"}, rows)
    before = done_before(file, settings)
    assert list(before) == ["a", "c"] and before["a"] == replace(rows[0], earlier=True)
    with pytest.raises(UserError, match=r"results\.json: is of a run with another data; use another --out"):
        done_before(file, {**settings, "data": "b"})
    file.write_text("{")
    with pytest.raises(UserError, match="cannot be read as results"):
        done_before(file, settings)


# ---- the programs


def test_kernels_of_an_h200_are_told_apart() -> None:
    """The names of a recorded profile; the parts have the milliseconds that were added up by hand then."""
    record = json.loads((ROOT / "records" / "2026-11-27-h200.json").read_text())
    recorded = [
        Kernel(row["kernel"], row["ms_a_step"], row["calls"])
        for row in record["step"]["kernels_of_a_step_now"]
        if not row["kernel"].startswith("Optimizer.")
    ]
    parts = by_part(recorded)
    assert parts["matrix products"]["ms"] == pytest.approx(29.8, abs=0.1)
    assert parts["attention"]["ms"] == pytest.approx(8.1, abs=0.1)
    assert parts["depthwise convolutions"]["ms"] == pytest.approx(2.9, abs=0.1)
    assert parts["patch convolution"]["ms"] == pytest.approx(1.4, abs=0.1)
    assert parts["copies"]["ms"] == pytest.approx(2.2, abs=0.1)
    assert sum(row["share"] for row in parts.values()) == pytest.approx(1, abs=1e-3)
    assert list(parts) == sorted(parts, key=lambda name: -parts[name]["ms"])


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("void at::native::multi_tensor_apply_kernel<..., FusedAdamMathFunctor<float, 4>>", "optimizer, average, norm"),
        (
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<LpNormFunctor>",
            "optimizer, average, norm",
        ),
        ("finish_kernel", "augmentation"),
        ("batch_norm_finish_kernel", "batch norm"),
        ("attention_forward_kernel", "attention"),
        ("attention_query_kernel", "attention"),
        ("gelu_dropout_backward_kernel", "GELU"),
        ("update_kernel", "optimizer, average, norm"),
        ("square_sum_kernel", "optimizer, average, norm"),
        ("batch_norm_apply_kernel", "batch norm"),
        ("Memcpy HtoD (Pinned -> Device)", "copies"),
        ("Memset (Device)", "memory set to a value"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel", "attention"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "matrix products"),
        ("aten::addmm", "matrix products"),
        ("triton_red_fused_native_layer_norm_backward_gelu_3", "layer norm, residual sums"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", kernels.OTHER),
    ],
)
def test_the_part_of_a_kernel(name: str, part: str) -> None:
    assert part_of(name) == part


def test_starts_of_kernels_are_counted() -> None:
    calls = [Kernel("cudaLaunchKernel", 12.0, 400), Kernel("cuLaunchKernelEx", 8.0, 100), Kernel("aten::add", 3.0, 2)]
    assert launches(calls) == {"calls": 500, "us": 40.0}
    assert launches([Kernel("aten::add", 3.0, 2)]) == {"calls": 0, "us": 0.0}


def test_a_prediction_is_compared_with_what_has_settled() -> None:
    facts = {"expected_images_per_second": 900.0, "rates": {"step": 1000.0}, "verdict": ["What limits ..."]}

    def line(epoch: int, rate: float, waiting: float) -> dict[str, float]:
        return {"epoch": epoch, "images_per_second": rate, "data_wait_fraction": waiting}

    lines = [line(0, 50, 0.9), line(1, 800, 0.2), {"epoch": 1, "top1": 0.5}, line(2, 850, 0.1), line(2, 700, 0.3)]
    result = comparison(facts, lines)
    assert result["trained_images_per_second"] == 800 and result["ratio"] == 1.125
    assert result["reported_waiting"] == 0.2 and result["implied_waiting"] == pytest.approx(0.2)
    with pytest.raises(UserError, match="no rate after its first epoch"):
        comparison(facts, lines[:1])


def test_epochs_that_fit() -> None:
    assert epochs_that_fit(300, 2.0, 84) == 100  # (300 - 84) / (1.08 * 2)
    assert epochs_that_fit(10, 2.0, 84) == 0


def test_runs_differ_by_their_steps_or_by_a_number() -> None:
    one = [{"step": 1, "train_loss": 2.0, "lr": 0.1, "step_ms": 5}, {"step": 2, "train_loss": 1.0, "lr": 0.1}]
    other = [{**one[0], "step_ms": 9}, {**one[1], "train_loss": 1.25}]
    assert difference(one, one) == 0 and difference(one, other) == 0.2 and difference(one, other[:1]) is None


def test_images_are_repeated_up_to_an_epoch(image_folder: Path, tmp_path: Path) -> None:
    assert repeated(image_folder, tmp_path / "more", 50) == 3
    assert len(list(tmp_path.glob("more/train/*/*"))) == 72 and len(list(tmp_path.glob("more/val/*/*"))) == 10
    assert repeated(image_folder / "train", tmp_path / "flat", 1) == 1
    assert len(list(tmp_path.glob("flat/val/*/*"))) == 24, "without splits, the same images are both"
    with pytest.raises(UserError, match="no images in class folders"):
        repeated(tmp_path / "none", tmp_path / "out", 1)


@pytest.mark.parametrize("there", [False, True])
def test_the_raw_copy_is_made_for_ffcv_and_removed(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, calls = tmp_path / "shards-half-raw", []

    def run_module(module: str, words: list[Any]) -> str:
        calls.append((module, list(map(str, words))))
        copy.mkdir(exist_ok=True)
        return ""

    monkeypatch.setattr(data_path, "run_module", run_module)
    if there:
        copy.mkdir()
    words = ["--data", str(tmp_path / "shards"), "--pipelines", "native,ffcv_raw", "--", "--cores", "1"]
    assert data_path.main(words) == 0
    bench = ["bench", "--data", str(tmp_path / "shards"), "--pipelines", "native,ffcv_raw", "--cores", "1"]
    assert calls[-1] == ("sdpnet.cli", bench)
    assert [module for module, _ in calls[:-1]] == ([] if there else ["sdpnet.pipelines.benchmarks.half_raw"])
    assert copy.exists() == there, "a copy that was there before is kept"


def test_an_operation_that_differs_is_found(shard_set: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A level more in the kernels' output, which on this CPU is the reference's, is more than rounding."""
    config = load_config("debug", [f"data.path={shard_set}", "data.image_size=16", "data.batch_size_per_gpu=4"])
    loader = make_loader(config.data, config.augment, "train", ShardOptions(), torch.device("cpu"), seed=0)
    batch = next(loader.batches())
    case, generator = next(fused.cases(4)), np.random.default_rng(0)
    assert fused.compare(case, batch, generator) == {"name": case.name, "same": True, "within": True, "largest": 0.0}
    stage = DeviceStage.__call__

    def shifted(self: DeviceStage, given: Any) -> Any:
        images, targets = stage(self, given)
        return images + (self.options.fused == "auto") * 1 / 255 / 0.229, targets

    monkeypatch.setattr(DeviceStage, "__call__", shifted)
    row = fused.compare(case, batch, generator)
    assert not row["same"] and not row["within"] and row["largest"] == pytest.approx(1, abs=0.05)


def test_every_test_file_of_a_gpu_is_run() -> None:
    files = gpu_test_files()
    assert "tests/sdpnet/test_side_stream.py" in files and "tests/pipelines/test_fused.py" in files
    assert all((ROOT / name).is_file() for name in files)


@pytest.mark.parametrize("files", [1, 2])
def test_tests_that_were_cut_off_are_named(files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest is killed within a test. It is alone in its process with one file, and may have workers with two."""
    name = "test_cut_off.py" if files == 1 else "test_other.py"
    text = (
        "import os, signal, time\nimport pytest\npytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\n"
        "@pytest.mark.parametrize('what', ['a word'])\ndef test_wrong(what): assert not what\n"
        "@pytest.mark.skip(reason='no GPU')\ndef test_skipped(): pass\n"
        "@pytest.fixture\ndef broken(): raise OSError\ndef test_broken(broken): pass\n"
        "def test_hangs(request):\n    time.sleep(1)\n"  # until the controller has written the lines of the others
        # Not by PYTEST_XDIST_WORKER: this suite may run in a worker, whose variables are inherited.
        "    is_worker = hasattr(request.config, 'workerinput')\n"
        "    os.kill(os.getppid() if is_worker else os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name)]
    if files == 2:
        (tmp_path / "test_first.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_first(): pass\n")
        paths.append(str(tmp_path / "test_first.py"))
    monkeypatch.setattr(checks, "_TINY_TESTS", paths)
    part = next(part for part in checks.CHECKS if part.name == "gpu_tests")
    settings = Settings(tmp_path, tmp_path, None, "cpu", "tiny")
    settings.file("gpu_tests", ".xml").write_text("of an earlier run")
    outcome = command._done(part, settings, 100)
    passed = "1 passed" if files == 1 else "2 passed"
    assert outcome.status == "failed", settings.file("gpu_tests", ".log").read_text()
    assert outcome.figures.startswith(f"{passed}, 1 skipped, 2 FAILED: "), outcome.figures
    assert f"{name}::test_wrong[a word]" in outcome.figures and f"{name}::test_broken" in outcome.figures
    assert json.loads(settings.file("gpu_tests").read_text())["complete"] is False


def test_a_log_without_a_test() -> None:
    with pytest.raises(ValueError, match="no test has ended"):
        checks._ended_tests("bringing up nodes...\nFAILED tests/a.py::test_b - of a summary\n")


# ---- the command


def rehearse(out: Path, data: Path, *words: str) -> int:
    return command.main(["--rehearsal", "--out", str(out), "--data", str(data), *words])


def test_mistakes(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--out", str(tmp_path / "out"))
    one_line(command.main([*out]), capsys, "sees no GPU", "--rehearsal")
    one_line(rehearse(tmp_path, shard_set, "--parts", "kernel"), capsys, "--parts kernel", "did you mean 'kernels'")
    one_line(rehearse(tmp_path, shard_set, "--minutes", "0"), capsys, "--minutes", "from 1 to 1440")
    one_line(rehearse(tmp_path, shard_set, "--recipes", "debug"), capsys, "--recipes debug: looks like NAME=SHARDS")
    one_line(rehearse(tmp_path, shard_set, "--recipes", "debg=x"), capsys, "did you mean 'debug'")
    one_line(rehearse(tmp_path, shard_set, "--recipes", "debug=nowhere"), capsys, "nowhere does not exist")
    one_line(rehearse(tmp_path, tmp_path), capsys, "manifest.json")
    one_line(command.main(["--rehearsal", *out, "--images", str(tmp_path / "no")]), capsys, "--images", "not a folder")
    assert not (tmp_path / "out").exists()
    assert parse_recipes(f"debug={shard_set}") == {"debug": shard_set}


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts that only end in different ways."""

    def part(name: str, code: str, *, is_check: bool, obstacle: str = "") -> Part:
        def words(settings: Settings, seconds: float) -> list[str]:
            write = f"import json, pathlib; pathlib.Path({str(settings.file(name))!r}).write_text('{{\"n\": 7}}'); "
            return ["-c", f"{write}{code}"]

        figures = lambda result: f"n is {result['n']}"  # noqa: E731
        return Part(name, name, is_check, 1, (1, 1, 1), words, figures, lambda settings: obstacle)

    parts = (
        part("good", "print('fine')", is_check=True),
        part("bad", "print('not equal'); raise SystemExit(1)", is_check=True),
        part("table", "raise SystemExit(2)", is_check=False),
        part("elsewhere", "", is_check=True, obstacle="needs another machine"),
    )
    monkeypatch.setattr(command, "PARTS", parts)


def test_how_parts_end(stand_ins: None, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert rehearse(out, shard_set) == 1
    text = capsys.readouterr().out
    assert "NOT CORRECT, or not shown to be: bad\n" in text and "needs another machine" in text
    results = json.loads((out / "results.json").read_text())
    assert [(row["part"], row["status"], row["figures"]) for row in results["parts"]] == [
        ("good", "passed", "n is 7"),
        ("bad", "failed", "n is 7"),
        ("table", "failed", "n is 7"),
        ("elsewhere", "not possible", "needs another machine"),
    ]
    assert (out / "good.log").read_text() == "fine\n" and results["machine"]["gpu"] is None
    (out / "good.log").unlink()
    assert rehearse(out, shard_set) == 1, "what has failed is done, too"
    assert not (out / "good.log").exists() and "passed earlier" in capsys.readouterr().out
    assert rehearse(out, shard_set, "--again", "--parts", "good") == 1, "another check has not passed"
    assert (out / "good.log").exists()


def test_the_quickest_parts(shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert rehearse(tmp_path, shard_set, "--parts", "depthwise") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "rehearsal on the CPU, tiny sizes: no figure counts" in text
    assert "depthwise passed" in text and "not measured: no NVIDIA GPU" in text and "nothing was checked" in text
    (row,) = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert row["part"] == "depthwise" and row["status"] == "passed" and row["seconds"] > 0


@pytest.mark.slow
def test_all_parts(
    native: None, image_folder: Path, shard_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["--images", str(image_folder), "--recipes", f"debug={shard_set}"]
    assert command.main(["--rehearsal", "--out", str(out), *words]) == 0, capsys.readouterr().out
    text = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    rows = {row["part"]: row for row in results["parts"]}
    assert list(rows) == ["shards", *ALL]
    assert {row["status"] for row in rows.values()} == {"passed"}, text
    assert all(row["figures"] for row in rows.values())
    assert all((out / f"{name}.log").is_file() for name in rows)
    prediction = json.loads((out / "prediction.json").read_text())
    assert prediction["expected_images_per_second"] > 0 and prediction["trained_images_per_second"] > 0
    assert json.loads((out / "accuracy.json").read_text())["recipes"][0]["last"]["top1"] >= 0
    print(rows["prediction"]["figures"])  # the prediction's figure, for a reader: noise on a busy CPU
