"""The completion scripts of shells."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from rotquant_tvm.cli.completion import SHELLS
from rotquant_tvm.cli.main import COMMANDS


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_knows_every_command_and_its_options(tvmc, shell):
    ended = tvmc("completion", shell)
    assert ended.status == 0 and ended.err == ""
    assert [word for word in (*COMMANDS, "kv-cache", "tuning-records") if word not in ended.out] == []


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [(["tvmc", "comp"], {"compile", "completion"}), (["tvmc", "compile", "--kv-cap"], {"--kv-capacity"})],
)
def test_bash_completes_commands_and_options(tvmc, words, expected, tmp_path):
    script = tmp_path / "tvmc.bash"
    script.write_text(tvmc("completion", "bash").out)
    ask = (
        f"source {script}; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        '$(complete -p tvmc | sed "s/.*-F \\([^ ]*\\).*/\\1/") tvmc; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, timeout=30)
    assert set(done.stdout.split()) == expected, done.stderr


def test_another_shell_is_a_usage_error(tvmc):
    assert tvmc("completion", "fish").status == 2
