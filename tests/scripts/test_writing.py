"""utils/results.py: a result is written whole or not at all, and by one run at a time."""

import errno
import os
import threading

import pytest
from safetensors import SafetensorError

from utils.results import (
    MACHINE,
    check_writable,
    load_json,
    one_run_at_a_time,
    save_json,
    save_tensors,
    write_atomically,
)
from utils.script import UserError


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = 2**22 + 1  # no process has this number
    names = {f"result.bin.{os.getppid()}@{MACHINE}.tmp", f"result.bin.{dead}@elsewhere.tmp"}
    for name in (f"result.bin.{dead}@{MACHINE}.tmp", f"a.{dead}@{MACHINE}.tmp", *names):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAbC123").write_bytes(b"half")
    with write_atomically(tmp_path / "result.bin") as path:
        path.write_bytes(b"whole")
        path.with_name(".tmpAbC123").write_bytes(b"half")  # of a library
    assert {path.name for path in tmp_path.iterdir()} == {*names, "result.bin"}


def test_a_folder_at_the_place_of_a_result_is_named_before_the_work(tmp_path):
    with pytest.raises(UserError, match="it is a folder"):
        check_writable(tmp_path)


def test_a_full_disk_under_safetensors_is_said_as_any_other_and_the_old_result_stays(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    path = tmp_path / "a.safetensors"
    save_tensors(path, {}, {"score": 1})
    before = path.read_bytes()
    monkeypatch.setattr("utils.results.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*a\.safetensors") as raised:
        save_tensors(path, {}, {})
    assert raised.value.errno == errno.ENOSPC
    assert path.read_bytes() == before and [*tmp_path.iterdir()] == [path]
    with pytest.raises(SafetensorError, match="other"), write_atomically(path):
        raise SafetensorError("other")


@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_replaces_a_folder_or_a_link_to_one_and_a_failure_leaves_it(tmp_path, is_link):
    folder, before = tmp_path / "adapter", tmp_path / ("somebodys" if is_link else "adapter")
    before.mkdir()
    (before / "file").write_text("theirs")
    if is_link:
        folder.symlink_to(before)
    with pytest.raises(KeyError), write_atomically(folder) as temporary:
        temporary.mkdir()
        raise KeyError
    assert (folder / "file").read_text() == "theirs"
    with write_atomically(folder) as temporary:
        temporary.mkdir()
        (temporary / "other").write_text("ours")
    assert [path.name for path in folder.iterdir()] == ["other"] and not folder.is_symlink()
    assert not is_link or (before / "file").read_text() == "theirs"


def test_a_second_run_of_a_result_waits_and_then_finds_it(tmp_path):
    path, found = tmp_path / "new" / "result.json", []

    def run() -> None:
        with one_run_at_a_time(path):
            found.append(load_json(path))

    second = threading.Thread(target=run)
    with one_run_at_a_time(path):
        second.start()
        second.join(0.3)
        assert not found
        save_json(path, {"score": 1})
    second.join(10)
    assert found == [{"score": 1}] and [*path.parent.iterdir()] == [path]
