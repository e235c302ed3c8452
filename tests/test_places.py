"""Containers, SLURM, Kubernetes and continuous integration: what their files name exists, and their commands run.

No container is built here, and no cluster is started. `srun` and `scontrol` are stand-ins for SLURM's programs,
torchrun is the real one.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from trainings import arguments, same_run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest itself needs it on Python 3.10

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = [yaml.safe_load(path.read_text()) for path in sorted((ROOT / ".github/workflows").glob("*.yml"))]
STEPS = [step for workflow in WORKFLOWS for job in workflow["jobs"].values() for step in job["steps"]]
COMMANDS = [step["run"] for step in STEPS if "run" in step]
PYTHONS = [str(c).rpartition(" ")[2] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
RECIPES = [ROOT / "containers/Dockerfile", ROOT / "containers/sdpnet.def"]


# ---- what the files name


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_a_recipe_agrees_with_the_project(recipe: Path) -> None:
    text = recipe.read_text()
    wheels, extras = "./dev wheel" in text, re.findall(r"(?:\.whl\)\[|extras=)([a-z,]+)", text)
    assert wheels and extras
    assert {name for names in extras for name in names.split(",")} <= set(PROJECT["optional-dependencies"])
    for requirement in re.findall(r'"(torch(?:vision)?[<>=][^"]+)"', text):
        assert requirement in PROJECT["optional-dependencies"]["train"]
    assert set(re.findall(r"(?:PYTHON=|python:)(3\.\d+)", text)) <= set(PYTHONS)


def test_both_recipes_install_the_same() -> None:
    docker, apptainer = (path.read_text() for path in RECIPES)
    for part in ("[train,dali,gpu]", "slim-bookworm", "gcc libc6-dev", " nasm"):
        assert part in docker and part.strip("[]") in apptainer
    assert 'ENTRYPOINT ["sdpnet"]' in docker and 'exec sdpnet "$@"' in apptainer
    assert docker.count("\nUSER 1000\n") == 2


def test_apptainer_copies_what_the_wheel_needs(tmp_path: Path) -> None:
    """Its `cp` follows links and knows no .dockerignore, so each path is named."""
    section = (ROOT / "containers/sdpnet.def").read_text().partition("\n%files\n")[2].partition("\n\n")[0]
    pairs = [line.split() for line in section.splitlines()]
    assert len(pairs) > 5
    for name, target in pairs:
        assert name not in (".", "..") and target == f"/source/{name}"
        subprocess.run(["cp", "-fLr", name, tmp_path / name], cwd=ROOT, check=True)
    pytest.importorskip("scikit_build_core")

    def wheel(source: Path, out: Path) -> set[str]:
        """Built from an sdist, as ./dev wheel does it: the names in it."""
        code = (
            f"import tarfile; from pathlib import Path; from scikit_build_core import build\nout = Path({str(out)!r})\n"
            "archive = out / build.build_sdist(str(out))\ntarfile.open(archive).extractall(out, filter='data')\n"
            "import os; os.chdir(archive.with_suffix('').with_suffix('')); print(build.build_wheel(str(out)))"
        )
        variables = {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "SDPNET_SKIP_NATIVE": "1"}
        subprocess.run([sys.executable, "-c", code], cwd=source, env=os.environ | variables, check=True)
        (path,) = out.glob("*.whl")
        return set(zipfile.ZipFile(path).namelist())

    assert wheel(tmp_path, tmp_path / "a") == wheel(ROOT, tmp_path / "b")


def test_the_commands_of_the_workflows_exist() -> None:
    known = [*re.findall(r"^([a-z-]+)\)", (ROOT / "dev").read_text(), re.M), "wheel"]
    named = [match for command in COMMANDS for match in re.findall(r"\./dev ([a-z-]+)", command)]
    assert {"setup", "test", "wheel"} == set(named) <= set(known)
    for path in re.findall(r"tests/\S+", " ".join(COMMANDS)):
        assert (ROOT / path).is_file(), path


def test_the_workflows_have_the_versions_of_the_project() -> None:
    matrix = next(w["jobs"]["test"]["strategy"]["matrix"] for w in WORKFLOWS if "test" in w["jobs"])
    assert matrix["python"] == PYTHONS
    torch = next(r for r in PROJECT["optional-dependencies"]["train"] if r.startswith("torch>"))
    assert matrix["torch"] == [re.findall(r">=([\d.]+)", torch)[0], "newest"]
    pins = [*PROJECT["optional-dependencies"]["dali-cuda120"][1:]]
    assert all(f'"{pin}"' in " ".join(COMMANDS) for pin in pins)


def test_the_workflows_may_do_no_more_than_they_need() -> None:
    for workflow in WORKFLOWS:
        assert workflow["permissions"] == {"contents": "read"} and workflow["concurrency"]
        for name, job in workflow["jobs"].items():
            assert job.get("permissions") == ({"id-token": "write"} if name == "publish" else None)
    assert all(re.search(r"@v\d+(\.\d+)*$", step["uses"]) for step in STEPS if "uses" in step)


# ---- the commands

SLURM = {
    "srun": '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n',  # starts the task on this machine
    "scontrol": '#!/bin/bash\ncase $1 in show) echo localhost ;; *) echo "$*" >>"$SCONTROL_LOG" ;; esac\n',
    "torchrun": f'#!/bin/bash\nexec "{sys.executable}" -m torch.distributed.run "$@"\n',
}


def environment(tmp_path: Path) -> dict[str, str]:
    """With the stand-ins for SLURM and this Python's torchrun before everything else in PATH."""
    programs = tmp_path / "programs"
    programs.mkdir(exist_ok=True)
    for name, text in SLURM.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SCONTROL_LOG": str(tmp_path / "scontrol.log"),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "1",
    }


def test_slurm_preempts_and_requeues(shard_set: Path, tmp_path: Path) -> None:
    """SIGUSR1 to the batch script: a checkpoint, one requeue; the next job ends with undisturbed weights."""
    script, env = ROOT / "examples/slurm/train.sbatch", environment(tmp_path)
    log = tmp_path / "scontrol.log"

    def job(out: Path) -> list[str]:
        return ["bash", str(script), *arguments(shard_set, out, "train.epochs=30")]

    first = subprocess.Popen(
        job(tmp_path / "run"), env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines, until = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (lines.is_file() and lines.stat().st_size) and first.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    first.send_signal(signal.SIGUSR1)
    said, _ = first.communicate(timeout=120)
    assert first.returncode == 0 and log.is_file(), said
    assert log.read_text() == f"requeue {os.getpid()}\n"
    assert "stopped after step" in said

    env["SLURM_RESTART_COUNT"] = "1"
    subprocess.run(job(tmp_path / "run"), env=env, check=True, timeout=300)
    subprocess.run(job(tmp_path / "rest"), env=env, check=True, timeout=300)
    assert log.read_text().count("requeue") == 1
    same_run(tmp_path / "run", tmp_path / "rest")


def test_the_script_for_slurm_ends_with_the_trainings_status(tmp_path: Path) -> None:
    command = ["bash", ROOT / "examples/slurm/train.sbatch", "--config", "debug", "--data", "missing", "--out", "run"]
    ended = subprocess.run(command, env=environment(tmp_path), cwd=tmp_path, capture_output=True, timeout=120)
    assert ended.returncode != 0 and not (tmp_path / "scontrol.log").exists()


def test_the_job_for_kubernetes_trains(shard_set: Path, tmp_path: Path) -> None:
    """Its command with its environment, on one process and with the debug config."""
    service, job = yaml.safe_load_all((ROOT / "examples/kubernetes/train.yaml").read_text())
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    values = {item["name"]: item["value"] for item in container["env"]}
    name = job["metadata"]["name"]
    assert values["NODES"] == str(spec["completions"]) == str(spec["parallelism"])
    assert values["PROCESSES"] == str(container["resources"]["limits"]["nvidia.com/gpu"])
    assert values["RENDEZVOUS"].startswith(f"{name}-0.{pod['subdomain']}:")
    assert service["metadata"]["name"] == pod["subdomain"] and service["spec"]["selector"] == {"job-name": name}
    assert {m["name"] for m in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}
    assert pod["terminationGracePeriodSeconds"] > 30

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    values |= {"NODES": "1", "PROCESSES": "1", "RENDEZVOUS": f"localhost:{port}"}
    command = [re.sub(r"\$\((\w+)\)", lambda m: values[m[1]], part) for part in container["command"]]
    changed = {"--config": "debug", "--data": str(shard_set), "--out": str(tmp_path / "run")}
    command = [f"{key}={changed[key]}" if (key := part.partition("=")[0]) in changed else part for part in command]
    settings = ["--pipeline", "torchvision", "data.batch_size_per_gpu=4", "data.num_workers=1", "train.epochs=1"]
    subprocess.run([*command, *settings], env=environment(tmp_path), check=True, timeout=200)
    assert (tmp_path / "run/metrics.jsonl").is_file(), shlex.join(command)
