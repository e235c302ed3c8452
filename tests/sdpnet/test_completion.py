"""`sdpnet completion`: its scripts have all commands and flags, and complete words in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from command_output import one_line

from sdpnet import cli
from sdpnet.config.names import config_names
from sdpnet.flags.completion import SHELLS

# What the shell offers at the end of the line, one word a line of the file OUT.
BASH = """
. ./completion
read -ra COMP_WORDS <<<"$1"
[[ $1 != *" " ]] || COMP_WORDS+=("")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMP_LINE=$1 COMP_POINT=${#1}
$(complete -p sdpnet | sed 's/.*-F \\([^ ]*\\) .*/\\1/') sdpnet "${COMP_WORDS[-1]}" "${COMP_WORDS[-2]}"
printf '%s\\n' "${COMPREPLY[@]}" >OUT
"""
FISH = """
source completion
complete -C $argv[1] | cut -f 1 >OUT
"""
ZSH = r"""
zmodload zsh/zpty
zpty shell "zsh -f -i"
zpty -w shell 'autoload -U compinit; compinit -u -D; eval "$(<completion)"'
zpty -w shell 'compadd() {
  local -a found; builtin compadd -O found "$@"; print -rl -- $found >>OUT; builtin compadd "$@"
}
completed() { print -r -- @ >>OUT }; comppostfuncs=(completed); print @@"ready"'
while zpty -r shell line; do [[ $line == *@@ready* ]] && break; done
zpty -n -w shell "$1"$'\t'
repeat 400; do grep -qs '^@' OUT && break; sleep 0.05; done
zpty -d shell
"""
PROGRAMS = {"bash": ["bash", "-c", BASH, "-"], "zsh": ["zsh", "-f", "-c", ZSH, "-"], "fish": ["fish", "-N", "-c", FISH]}


@pytest.mark.parametrize("shell", SHELLS)
def test_completion_has_all_commands_and_flags(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for name in cli.COMMANDS:
        assert name in script
    prefix = "" if shell == "fish" else "--"
    for flag in ("max-side", "checksums", "decode", "images", "resume", "per-class", "variant", "ceilings", "diff"):
        assert f"{prefix}{flag}" in script
    assert "tiny_imagenet/seed" in script and "optim.lr" in script


def offered(shell: str, folder: Path, line: str) -> set[str]:
    """What the shell offers at the end of a line, with the script `completion` in the folder."""
    (folder / "OUT").unlink(missing_ok=True)
    command = [*PROGRAMS[shell], line]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert (folder / "OUT").is_file(), done.stdout + done.stderr
    return {word.strip().rstrip("/") for word in (folder / "OUT").read_text().splitlines()} - {"", "@"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_completes(shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell}")
    assert cli.main(["completion", shell]) == 0
    (tmp_path / "completion").write_text(capsys.readouterr().out)
    (tmp_path / "shards").mkdir()

    def completed(line: str) -> list[str]:
        return sorted(offered(shell, tmp_path, line))

    assert completed("sdpnet con") == ["config", "convert"]
    assert completed("sdpnet train --res") == ["--resume"]
    assert completed("sdpnet train --config debug optim.lr=1 --res") == ["--resume"]
    names = [name for name in config_names() if name.startswith("sdpnet_")]
    assert completed("sdpnet train --config sdpnet_") == completed("sdpnet config --diff sdpnet_") == names
    assert completed("sdpnet train --data sh") == completed("sdpnet report shards sh") == ["shards"]
    assert completed("sdpnet config optim.nam") == ["optim.name"]
    assert completed("sdpnet bench st") == ["step"]
    assert completed("sdpnet bench --data shards --ro") == completed("sdpnet bench step --ro") == ["--rounds"]
    assert completed("sdpnet bench step --mo") == ["--model"]
    assert completed("sdpnet bench step --compile ") == ["auto", "no", "yes"]


def test_completion_without_shtab(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    one_line(cli.main(["completion", "bash"]), capsys, "completion needs shtab", "completion")
