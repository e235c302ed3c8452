"""./dev: what it says before, while and after it works. Python, pip, apt and the checkers are stand-ins; nothing is
downloaded."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Stands for Python with venv and pip. Python code runs in the real one; pip writes down how it was called, and what the
# test puts into the file "pip-does" is what it does.
PYTHON = """#!/bin/sh
case "$1 $2" in
"-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip")
    case $* in
    *--version) ;;
    *freeze*) echo "torch==1.0" ;;
    *"config list"*) cat "{configuration}" ;;
    *)
        echo "constraint=${{PIP_CONSTRAINT:-}} cache=${{PIP_NO_CACHE_DIR:-}} $*" >>"{calls}"
        [ ! -e "{does}" ] || . "{does}"
        ;;
    esac ;;
*importlib.metadata*) exit 1 ;; # torch is not there
*) exec {python} "$@" ;;
esac
"""


class Checkout:
    """A copy of the files that ./dev reads, with stand-ins first in PATH."""

    def __init__(self, root: Path) -> None:
        self.root, self.bin = root / "check out", root / "bin"
        self.calls, self.does, self.configuration = root / "calls", root / "pip-does", root / "pip.conf"
        self.configuration.write_text("global.index-url='file:///index'\n")
        scripts = [path.relative_to(ROOT) for path in (ROOT / "scripts").glob("*.sh")]
        for name in ("dev", "pyproject.toml", "tests/support/locked_versions.py", "pipelines/native/task.h", *scripts):
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "pipelines" / "native" / "a.cpp").write_text("")
        self.bin.mkdir()
        python = PYTHON.format(
            calls=self.calls, does=self.does, configuration=self.configuration, python=sys.executable
        )
        for name, text in {"python3": python, "apt-get": "#!/bin/sh\n", "dpkg": "#!/bin/sh\n"}.items():
            self.stand_in(name, text)
        self.stand_in("id", "#!/bin/sh\necho 0\n")
        self.stand_in("pkg-config", "#!/bin/sh\nexit 1\n")
        for name in ("hadolint", "actionlint"):  # there may be real ones in PATH, and the copy has nothing for them
            self.stand_in(name, "#!/bin/sh\n")
        self.free(100_000)

    def stand_in(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def free(self, megabytes: int) -> None:
        """What df says."""
        line = f"/dev/disk 1 1 {megabytes * 1000} 1% /"
        self.stand_in(
            "df", f"#!/bin/sh\necho 'Filesystem 1024-blocks Used Available Capacity Mounted on'\necho '{line}'\n"
        )

    def start(self, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "SDPNET_"))}
        environment |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "SDPNET_SKIP_BACKENDS": "1", **variables}
        command = ["sh", str(self.root / "dev"), *arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, env=environment, cwd="/"
        )

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        process = self.start(*arguments, **variables)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def pip_calls(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_it_says_what_it_takes_and_is_not_repeated(checkout: Checkout) -> None:
    status, out, err = checkout.run("setup")
    assert status == 0, out + err
    assert "3.1 GB    5.8 GB   torch" in out and "0.3 GB    0.9 GB   test tools" in out
    assert "about 3.4 GB to download and 6.7 GB on the disk" in out and "100.0 GB are free" in out
    assert "FFCV with numba" not in out, "it is left out"
    assert out.index("to download") < out.index("virtual environment") < out.index("sdpnet, torch, test tools")
    assert "SDPNET_TORCH_INDEX=URL" in out and "set-up complete" in out
    calls = checkout.pip_calls()
    assert any("-e .[train,docs] --group test" in call for call in calls)
    status, out, _ = checkout.run("setup")
    assert status == 0 and out.startswith("set-up: already done") and checkout.pip_calls() == calls


def test_parts_and_light_ways(checkout: Checkout) -> None:
    checkout.free(10)
    _, out, _ = checkout.run("setup", SDPNET_SKIP_BACKENDS="")
    assert "FFCV with numba" in out and "DALI: --pipeline dali" in out and "SDPNET_SKIP_BACKENDS=1 ./dev setup" in out
    assert "Debian packages that FFCV" in out
    checkout.stand_in("id", "#!/bin/sh\necho 1000\n")
    assert "FFCV: left out" in checkout.run("setup", SDPNET_SKIP_BACKENDS="")[1]
    _, out, _ = checkout.run("setup", SDPNET_TORCH_INDEX="file:///index")
    assert "0.3 GB    1.1 GB   torch and torchvision from SDPNET_TORCH_INDEX" in out


@pytest.mark.parametrize(("free", "fits", "cache"), [(9_800, False, ""), (10_200, True, "1"), (13_600, True, "")])
def test_a_disk_too_small_is_said_before_anything_is_fetched(
    free: int, fits: bool, cache: str, checkout: Checkout
) -> None:
    """6,730 MB are to lie there in the end, 3,410 MB beside them meanwhile, and as much in pip's cache if it can."""
    checkout.free(free)
    checkout.does.write_text("case $* in *test*) exit 1 ;; esac\n")
    status, out, err = checkout.run("setup")
    assert status == 1
    calls = [call for call in checkout.pip_calls() if "test" in call]
    if fits:
        assert calls and all(f" cache={cache} " in f" {call} " for call in calls)
        assert ("pip's cache is not used" in out) is (cache == "1")
    else:
        assert calls == [] and len(err.splitlines()) == 2
        assert err.startswith("dev: the disk is too small: 10.1 GB are needed while it installs, 9.8 GB are free")


def test_a_disk_that_cannot_take_it_at_all(checkout: Checkout) -> None:
    checkout.free(6_000)
    status, _, err = checkout.run("setup")
    assert (
        status == 1 and err.startswith("dev: the disk is too small: 6.7 GB are needed") and checkout.pip_calls() == []
    )


UV = """#!/bin/sh
if [ "$1" = --version ]; then echo "uv 9.9.9 (somewhere)"; exit; fi
echo "uv $*" >>"{calls}"
exit {status}
"""


@pytest.mark.parametrize(
    ("configuration", "works", "by_uv", "by_pip"),
    [
        ("", True, True, False),
        (":env:.disable-pip-version-check='1'\n:env:.user='0'\nglobal.timeout='60'\n", True, True, False),
        ("", False, True, True),  # another look with pip
        ("global.extra-index-url='https://user:secret@host/simple'\n:env:.cert='/ca'\n", True, False, True),
    ],
)
def test_uv_where_it_sees_what_pip_sees(
    configuration: str, works: bool, by_uv: bool, by_pip: bool, checkout: Checkout
) -> None:
    checkout.configuration.write_text(configuration)
    checkout.stand_in("uv", UV.format(calls=checkout.calls, status=int(not works)))
    checkout.free(9_000)  # enough for uv, which keeps no downloads
    status, out, err = checkout.run("setup")
    calls = [call for call in checkout.pip_calls() if "-e .[train,docs] --group test" in call]
    assert [call.startswith("uv pip install --python ") for call in calls] == [True] * by_uv + [False] * (
        by_pip and by_uv
    )
    if by_uv:
        assert status == 0 and "installing with uv 9.9.9\n" in out, err
    else:
        assert "installing with pip: its configuration says more than uv reads (cert extra-index-url)" in out
        assert "secret" not in out and status == 1 and "the disk is too small: 10.1 GB" in err


def test_torch_from_another_index(checkout: Checkout) -> None:
    assert checkout.run("setup", SDPNET_TORCH_INDEX="file:///index")[0] == 0
    torch, rest = [call for call in checkout.pip_calls() if "--upgrade pip" not in call][:2]
    assert "--index-url file:///index torch>=" in torch
    assert "-e .[train,docs] --group test" in rest and "--index-url" not in rest


@pytest.mark.parametrize(
    ("said", "hint"),
    [
        ("NewConnectionError: Failed to establish a new connection", "no package index could be reached"),
        ("OSError: [Errno 28] No space left on device", "the disk is full"),
        ("something else", "Repeating ./dev demo goes on from there"),
    ],
)
def test_a_step_that_fails(said: str, hint: str, checkout: Checkout) -> None:
    checkout.does.write_text(f'case $* in *test*) echo "{said}"; exit 1 ;; esac\n')
    status, out, err = checkout.run("demo")
    assert status == 1 and hint in err and said in err and "stopped at: sdpnet, torch, test tools" in err
    assert "failed" in out and said in (checkout.root / ".venv" / "setup.log").read_text()
    if said == "something else":
        checkout.does.unlink()
        assert checkout.run("setup")[0] == 0


def wait_for(path: Path) -> str:
    for _ in range(200):
        if path.exists() and path.read_text().strip():
            return path.read_text().strip()
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


@pytest.mark.parametrize(("number", "expected"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_all_that_was_started(number: int, expected: int, checkout: Checkout, tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    checkout.does.write_text(f'case $* in *test*) sleep 600 & echo $! >"{pid}"; wait ;; esac\n')
    process = checkout.start("setup")
    sleeper = int(wait_for(pid))
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == expected
    for _ in range(50):
        try:
            os.kill(sleeper, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{sleeper}/stat").read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        raise AssertionError("what pip had started goes on")
    checkout.does.unlink()
    assert checkout.run("setup")[0] == 0


@pytest.mark.skipif(shutil.which("flock") is None, reason="no flock")
def test_after_kill_9_what_is_left_is_waited_for(checkout: Checkout, tmp_path: Path) -> None:
    pid, go = tmp_path / "pid", tmp_path / "go"
    does = f'case $* in *test*) echo $$ >"{pid}"; while [ ! -e "{go}" ]; do sleep 0.1; done ;; esac\n'
    checkout.does.write_text(does)
    first = checkout.start("setup")
    wait_for(pid)
    first.kill()
    first.wait()
    second = checkout.start("setup")
    assert second.stdout is not None and second.stdout.readline().startswith(
        "another set-up of this checkout is running"
    )
    go.touch()
    out, err = second.communicate(timeout=60)
    assert second.returncode == 0 and "set-up complete" in out, err
    assert first.stdout is not None and first.stderr is not None
    first.stdout.close()
    first.stderr.close()


def test_locked(checkout: Checkout) -> None:
    assert checkout.run("setup", "--locked")[2].startswith("dev: there is no ")
    (checkout.root / "requirements.lock").write_text("torch==2.11.0\nnumpy==2.2.1 ; python_version < '3.11'\n")
    status, out, err = checkout.run("setup", "--locked")
    assert status == 0 and "with the versions in requirements.lock" in out, err
    assert all(call.startswith("constraint=.venv/constraints.txt ") for call in checkout.pip_calls())
    kept = (checkout.root / ".venv" / "constraints.txt").read_text()
    assert kept == (checkout.root / "requirements.lock").read_text()
    assert "already done" in checkout.run("setup")[1], "what is there stays locked"
    (checkout.root / "requirements.lock").write_text("torch==2.12.0\n")
    assert "torch" in checkout.run("setup")[1], "another lock is another set-up"


def test_the_lock_on_a_card_without_cuda_13(checkout: Checkout) -> None:
    checkout.stand_in("nvidia-smi", "#!/bin/sh\necho '7.0, 535.104.05'\n")
    pins = ["torch==2.14.1", "torchvision==0.29.1", "triton==3.8.0", "nvidia-nccl-cu13==2.30.7", "torchmetrics==1.9.0"]
    (checkout.root / "requirements.lock").write_text("\n".join(pins) + "\n")
    status, out, err = checkout.run("setup", "--locked")
    assert status == 0 and "requirements.lock holds here without torch" in out, err
    kept = (checkout.root / ".venv" / "constraints.txt").read_text().split()
    assert kept == ["torchmetrics==1.9.0", "torch==2.10.*", "torchvision==0.25.*"]


def test_the_newest_are_bound_by_nothing_but_the_machines_own(checkout: Checkout) -> None:
    assert checkout.run("setup", PIP_CONSTRAINT="/mine")[0] == 0
    assert all(call.startswith("constraint=/mine ") for call in checkout.pip_calls())


def test_a_failure_of_the_tests_is_explained(checkout: Checkout) -> None:
    assert checkout.run("setup")[0] == 0
    commands = checkout.root / ".venv" / "bin"
    summary = "FAILED tests/test_a.py::test_b[1 x-y] - AssertionError: no - never\n1 failed, 3 passed"
    results = {"ruff": "", "mypy": "echo found 1 error; exit 1", "mkdocs": "", "pytest": f"echo '{summary}'; exit 1"}
    for name, text in results.items():
        (commands / name).write_text(f"#!/bin/sh\n{text}\n")
        (commands / name).chmod(0o755)
    (checkout.root / "requirements.lock").write_text("packaging==0.1\n")
    status, out, _ = checkout.run("test")
    assert status == 1
    log = checkout.root / ".venv" / "test.log"
    assert f"Not passed: mypy, pytest. All output is in {log}" in out
    assert ".venv/bin/python -m pytest 'tests/test_a.py::test_b[1 x-y]'" in out
    assert (
        "here: Python " in out and "the suite last passed with other versions (requirements.lock): packaging 0.1" in out
    )
    assert "found 1 error" in log.read_text() and "1 failed, 3 passed" in log.read_text()
    assert "has not passed" in checkout.run("lock")[2]


def test_versions_that_passed_are_kept_for_the_lock(checkout: Checkout) -> None:
    assert checkout.run("setup")[0] == 0
    for name in ("ruff", "mypy", "mkdocs", "pytest"):
        (checkout.root / ".venv" / "bin" / name).write_text("#!/bin/sh\n")
        (checkout.root / ".venv" / "bin" / name).chmod(0o755)
    passed = checkout.root / ".venv" / "tests-passed"
    assert checkout.run("test", "-k", "plan")[0] == 0 and not passed.exists(), "a part of the suite is not the suite"
    assert checkout.run("test")[0] == 0 and passed.read_text() == "torch==1.0\n"


def test_the_linters_of_containers_and_workflows_may_be_missing(checkout: Checkout) -> None:
    assert checkout.run("setup")[0] == 0
    for name in ("ruff", "mypy", "mkdocs", "pytest"):
        (checkout.root / ".venv" / "bin" / name).write_text("#!/bin/sh\n")
        (checkout.root / ".venv" / "bin" / name).chmod(0o755)
    checkout.stand_in("actionlint", '#!/bin/sh\necho "$1:3: no such action"; exit 1\n')
    status, out, _ = checkout.run("test")
    assert status == 1 and "Not passed: actionlint." in out and ".github/workflows/*.yml:3: no such action" in out
    for name in ("hadolint", "actionlint"):
        (checkout.bin / name).unlink()
    if shutil.which("hadolint") or shutil.which("actionlint"):
        pytest.skip("the linters are installed")
    status, out, _ = checkout.run("test")
    assert status == 0 and out.count("not installed, so ") == 2 and "pip install --group lint" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["setup", "--lock"],
        ["lock", "now"],
        ["demo", "x"],
        ["tset"],
        ["wheel", "--target"],
        ["wheel", "--target", "riscv64"],
    ],
)
def test_mistakes(arguments: list[str], checkout: Checkout) -> None:
    status, out, err = checkout.run(*arguments)
    assert status == 2 and out == "" and err.startswith("dev: ") and err.count("\n") == 1


def test_documents_are_built_strictly_and_served(checkout: Checkout) -> None:
    assert checkout.run("setup")[0] == 0
    commands, calls = checkout.root / ".venv" / "bin", checkout.root / "mkdocs-calls"
    for name in ("ruff", "mypy", "pytest"):
        (commands / name).write_text("#!/bin/sh\n")
    (commands / "mkdocs").write_text(f'#!/bin/sh\necho "$*" >>"{calls}"\necho WARNING: no such page; exit 1\n')
    for name in ("ruff", "mypy", "pytest", "mkdocs"):
        (commands / name).chmod(0o755)
    status, out, _ = checkout.run("test")
    assert status == 1 and "Not passed: documents." in out and "WARNING: no such page" in out and "./dev docs" in out
    checkout.run("docs", "--dev-addr", "127.0.0.1:9000")
    build, serve = calls.read_text().splitlines()
    assert build == f"build --strict --site-dir {checkout.root}/.venv/site"
    assert serve == "serve --dev-addr 127.0.0.1:9000"
