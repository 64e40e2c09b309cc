"""utils/script.py: how every script starts and ends, and how it records its surroundings."""

import dataclasses
import errno
import io
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import cache
from tests.conftest import ROOT, flags, run_command, run_in_process, write_rows
from tests.processes import exit_codes, start
from utils.results import write_atomically
from utils.script import environment, git_commit, run_script


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of a made-up script."""

    path: Path = Path("x")


def run(monkeypatch, main: Callable[[Config], object], *arguments: object) -> int | str | None:
    """The exit code of a script with this `main`, or its message."""
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        run_script(main, Config, None)
    return ended.value.code


def test_a_file_that_cannot_be_written_is_named(monkeypatch):
    def main(config: Config) -> None:
        raise OSError(errno.ENOSPC, "No space left", str(config.path))

    said = "error: cannot write there/a.json: No space left. Free space or set --results_dir."
    assert run(monkeypatch, main, "--path", "there/a.json") == said
    with pytest.raises(OSError, match="Bad file descriptor"):  # a fault of the program shows its traceback
        run(monkeypatch, lambda config: os.close(-1))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_ended_program_leaves_no_temporary_file(number, code, tmp_path):
    def main(config: Config) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # also behind a shell's `&`
        with write_atomically(config.path) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), number)
            time.sleep(30)

    def whole(rank: int) -> None:
        sys.argv = ["script.py", "--path", str(tmp_path / "result.bin")]
        run_script(main, Config, None)

    assert exit_codes(start(whole, output=tmp_path / "said", whole=True)) == [code]
    assert [path.name for path in tmp_path.iterdir()] == ["said"]
    said = "" if code == 143 else "interrupted; nothing half-written is left behind\n"
    assert (tmp_path / "said").read_text() == said


def test_a_reader_that_has_seen_enough_is_no_fault(tmp_path):
    """The reader, such as `head`, has closed the pipe when the script writes."""

    def whole(rank: int) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        sys.stdout = open(writer, "w")  # noqa: SIM115, open as long as the process lives
        sys.argv = ["cache.py", "--help"]
        run_script(cache.main, cache.Config, None)

    assert exit_codes(start(whole, output=tmp_path / "said", whole=True)) == [141]
    assert "Broken" not in (tmp_path / "said").read_text()


def test_a_name_that_the_terminal_cannot_show_is_escaped(names, tmp_path, monkeypatch):
    path = write_rows(tmp_path / "r\u00fcckl\u00e4ufig.jsonl", [{"text": "a b", "label": i % 2} for i in range(40)])
    options = flags(names | {"dataset_name": path, "results_dir": tmp_path / "\u732b"})
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown := io.BytesIO(), encoding="ascii"))
    assert run_in_process(monkeypatch, "cache.py", *options) == 0
    assert rb"r\xfcckl\xe4ufig.jsonl" in shown.getvalue() and rb"\u732b" in shown.getvalue()


def test_the_commit_is_that_of_this_repository_or_none(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    git("commit", "--allow-empty", "-m", "a")
    (tmp_path / "unpacked").mkdir()
    commit = git_commit(tmp_path)
    assert commit is not None and re.fullmatch("[0-9a-f]{12}", commit)
    (tmp_path / "file").touch()
    git("add", "file")
    assert git_commit(tmp_path) == f"{commit}-dirty"
    assert git_commit(tmp_path / "unpacked") is None
    monkeypatch.setenv("PATH", "")
    assert git_commit(tmp_path) is None and environment()["git_commit"] is None


def test_help_loads_no_library_that_it_does_not_need():
    scripts = sorted(path.name for path in ROOT.glob("*.py"))
    heavy = ("accelerate", "datasets", "matplotlib", "peft", "scipy.stats", "sklearn", "transformers.modeling_utils")
    code = f"""
import runpy, sys
for script in {scripts}:
    sys.argv = [script, "--help"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as ended:
        print(script, ended.code, *(name for name in {heavy} if name in sys.modules), sep=" ", file=sys.stderr)
"""
    assert run_command("-c", code).stderr.splitlines() == [f"{script} 0" for script in scripts]


def test_settings_and_not_the_environment_decide_the_precision(monkeypatch):
    names = {"ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS"}
    names |= {"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE"}
    for name in names:
        monkeypatch.setenv(name, "bf16")
    runpy.run_path(str(ROOT / "utils" / "__init__.py"))  # before any library is loaded
    assert not names & set(os.environ)
