"""Completion of the command line, asked directly and through the shells that are installed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hpm.commands.cli import main
from hpm.commands.completion import complete
from hpm.commands.completion_scripts import SCRIPTS


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["pret"], ["pretrain"]),
        (["ev"], ["eval"]),
        (["eval", "kn"], ["knn"]),
        (["eval", "knn", "runs/first", "--basel"], ["--baselines"]),
        (["pretrain", "photos", "--mask-u"], ["--mask-unit"]),
        (["pretrain", "photos", "--config", "demo"], ["demo", "demo_video"]),
        (["pretrain", "photos", "--predictor-loss", ""], ["relative", "absolute", "none"]),
        (["pretrain", "photos", "--mine-by=t"], ["--mine-by=teacher"]),
        (["pretrain", "photos", "--mine-by", "=", "t"], ["teacher"]),  # as bash splits it
        (["pretrain", "photos", "--mine-by", "="], ["teacher", "memory", "progress"]),
        (["completion", "ba"], []),  # positional: files, or nothing
        (["pretrain", ""], []),
        (["nonsense", "--"], []),
        (["eval", "nonsense", "--"], []),
        (["pretrain", "photos", "--nonsense", ""], []),
    ],
)
def test_words(words: list[str], expected: list[str]) -> None:
    assert complete(words) == expected


def test_every_verb_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["__complete", ""]) == 0
    assert {"pretrain", "eval", "doctor"} <= set(capsys.readouterr().out.split())


def test_an_unknown_shell_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "powershell"]) == 2
    assert "bash, zsh, fish" in capsys.readouterr().err


ASKING = {
    "bash": "COMP_WORDS=(hpm pretrain x --mine-by te); COMP_CWORD=4; _hpm; echo ${COMPREPLY[@]}",
    "fish": "complete -C 'hpm pretrain x --mine-by te'",
}


@pytest.mark.parametrize("shell", ASKING)
def test_in_the_shell(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"no {shell}")
    command = tmp_path / "hpm"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m hpm "$@"\n')
    command.chmod(0o755)
    script = f'set PATH "{tmp_path}" $PATH;' if shell == "fish" else f'PATH="{tmp_path}:$PATH";'
    script += f"\n{SCRIPTS[shell]}\n{ASKING[shell]}"
    ran = subprocess.run([shell, "-c", script], capture_output=True, text=True, check=True)
    assert "teacher" in ran.stdout.split(), ran.stderr
