"""Results that cannot be written are said so before the work; stopped programs leave one line and no files."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_in_process
from utils.script import UserError, check_writable, replace_folder, temporary_path, write_atomically

SCRIPTS = ("cache.py", "linear_training.py", "lora_finetuning.py", "from_scratch.py", "linear_sklearn.py")


@pytest.fixture
def no_model(monkeypatch):
    """Makes it a mistake to run a model."""

    def fail(*_):
        raise AssertionError("the work has begun")

    monkeypatch.setattr("utils.models.load.load_weights", fail)


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("place", ["a file", "a long name", "below a file", "a loop of links"])
def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    script, place, model_dirs, rows_path, tmp_path, monkeypatch, no_model
):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    results = {"a file": "file", "a long name": "x" * 300, "below a file": "file/below", "a loop of links": "loop"}[
        place
    ]
    arguments = ["--model_name", model_dirs["llama"], "--dataset_name", rows_path, "--max_samples", 30]
    message = run_in_process(monkeypatch, script, *arguments, "--results_dir", tmp_path / results)
    assert message.startswith("error: cannot write") and "--results_dir" in message and len(message) < 500
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_folder_without_permission_or_read_only_is_named(code, tmp_path, monkeypatch):
    def refuse(path, *_, **__):
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "touch", refuse)
    with pytest.raises(UserError, match=f"cannot write .*{os.strerror(code)}.*--results_dir"):
        check_writable(tmp_path / "result.json")


def test_trying_leaves_nothing(tmp_path):
    check_writable(tmp_path / "a" / "b" / "result.json")
    assert not list(tmp_path.iterdir())


def test_two_runs_that_try_the_same_new_folder_at_once_do_not_disturb_each_other(tmp_path, monkeypatch):
    """The other one removes what both have made, before this one has tried it, or writes into it."""
    touch, unlink = Path.touch, Path.unlink

    def touch_too_late(path, *_, **__):
        path.parent.rmdir()
        touch(path)

    def write_beside(path, *_, **__):
        unlink(path)
        (path.parent / "of the other").write_text("")

    for name, of_other in (("touch", touch_too_late), ("unlink", write_beside)):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, of_other)
            check_writable(tmp_path / name / "b" / "result.json")
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["of the other"]


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead, living = dead_process(), os.getppid()
    own = temporary_path(tmp_path / "result.bin").name.removeprefix(f"result.bin.{os.getpid()}").removesuffix(".tmp")
    dead_here, of_another_machine = f"result.bin.{dead}{own}.tmp", f"result.bin.{dead}@another-machine.tmp"
    for name in (dead_here, of_another_machine):
        (tmp_path / name).write_bytes(b"half")
    for process in (dead, living):
        (tmp_path / f"result.bin.{process}.tmp").write_bytes(b"half")
        (tmp_path / f"adapter.{process}.tmp").mkdir()
        (tmp_path / f"other.bin.{process}.tmp").write_bytes(b"half")
    with write_atomically(tmp_path / "result.bin") as path:
        path.write_bytes(b"whole")
    with replace_folder(tmp_path / "adapter") as folder:
        (folder / "weights").write_bytes(b"whole")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "result.bin", "adapter", f"result.bin.{living}.tmp", f"adapter.{living}.tmp", f"other.bin.{living}.tmp",
        f"other.bin.{dead}.tmp", of_another_machine,
    }  # fmt: skip


WAITING = """
import os, signal, sys, time
from dataclasses import dataclass
from pathlib import Path
from utils.script import run_script, write_atomically

@dataclass(frozen=True)
class Config:
    path: Path = Path("x")

def main(config):
    with write_atomically(config.path) as temporary:
        temporary.write_bytes(b"half")
        os.kill(os.getpid(), getattr(signal, sys.argv[0]))
        time.sleep(30)

name = sys.argv.pop(1)
sys.argv[0] = name
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` had it ignored
run_script(main, Config, None)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_stopped_program_leaves_no_temporary_file(name, code, tmp_path):
    command = [sys.executable, "-c", WAITING, name, "--path", str(tmp_path / "result.bin")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == code and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_ctrl_c_while_libraries_load_is_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    hears = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # also behind `&`
    command = [sys.executable, "-c", f"{hears}; import sys, utils; sys.path.insert(0, {str(tmp_path)!r}); import torch"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode in (130, -signal.SIGINT) and result.stderr == "interrupted\n"


def test_who_has_seen_enough_of_what_is_printed_is_no_fault():
    done = subprocess.run(
        f"{sys.executable} -m utils.data.load | true; exit ${{PIPESTATUS[0]}}",
        cwd=ROOT, shell=True, executable="/bin/bash", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 141 and not done.stderr
