"""utils/results.py: files are written whole by one run at a time, checked when read, and reused, refused or made."""

import errno
import math
import os
import struct
import threading

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import cache
import K_sweep
from tests.conftest import configure
from utils import results
from utils.results import difference
from utils.script import UserError
from utils.settings import Run, all_settings, result_settings

BOTH = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
TENSORS = {
    "left": BOTH[:, :2],  # two views of one tensor
    "right": BOTH[:, 2:],
    "row": BOTH[1],
    "short": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "counts": torch.tensor([3, 1, 2]),
    "number": torch.tensor(0.25),
    "none": torch.zeros(0, 4),
}
METADATA = {"config": {"seed": 0}, "name": "ä"}


# ------------------------------------------------------------------ tensors and JSON
@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    results.save_tensors(path, TENSORS, METADATA)
    return path


def read_all(path) -> dict[str, torch.Tensor]:
    with results.open_tensors(path) as (file, _):
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no dict


def test_tensors_come_back_as_they_are_also_to_safetensors(written):
    for found in (read_all(written), load_file(written)):
        assert found.keys() == TENSORS.keys()
        for name, tensor in TENSORS.items():
            assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
    with results.open_tensors(written) as (file, metadata):
        assert metadata == {"format_version": 4, **METADATA}
        with pytest.raises(UserError, match=r"file\.safetensors has no other"):
            file.get_tensor("other")
    with pytest.raises(ValueError, match="JSON"):
        results.save_tensors(written.with_name("nan.safetensors"), {}, {"score": math.nan})


@given(st.data())
def test_a_changed_byte_is_found(written, data):
    """Finds any changed byte of the numbers, and bytes of the header that change a tensor or the checksums."""
    content = bytearray(written.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    index = data.draw(st.one_of(st.integers(0, header - 1), st.integers(header, len(content) - 1)))
    content[index] ^= data.draw(st.integers(1, 255))
    damaged = written.with_name("changed.safetensors")
    damaged.write_bytes(content)
    try:
        found = read_all(damaged)
    except UserError as error:
        assert str(damaged) in str(error)
    else:  # the byte belongs to the other metadata, or is a blank
        assert index < header
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in found.items())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("null", "was not written by this version"),  # a file of safetensors that is not ours
        ("{", "is damaged"),
        ("[" * 100_000, "is damaged"),
        ('{"format_version": 3, "crc32": {}}', "was not written by this version"),
        ('{"format_version": 4}', "is incomplete: it has no 'crc32'"),
        (b"", "is damaged"),
        (struct.pack("<Q", 2**63 - 1), "is damaged"),  # the length of the header
    ],
)
def test_a_foreign_an_old_and_a_damaged_file_are_refused_with_the_command(content, words, tmp_path):
    path = tmp_path / "moments" / "tiny" / "kind" / "test.safetensors"
    path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        save_file({"a": torch.zeros(1)}, path, metadata={"json": content})
    with pytest.raises(UserError, match=words) as raised, results.open_tensors(path):
        pass
    assert str(path) in str(raised.value) and "Delete it, or run the script" in str(raised.value)


def test_json_is_strict_and_a_failed_write_leaves_the_old_file(tmp_path):
    path, content = tmp_path / "result.json", {"score": [1, 0.1, None, "ä"], "config": {}}
    results.save_json(path, content)
    with pytest.raises(ValueError, match="JSON"):
        results.save_json(path, {"deep": [-math.inf]})
    assert [*tmp_path.iterdir()] == [path] and results.read_stored(path) == content
    with pytest.raises(UserError, match=r"result\.json is incomplete: it has no 'seed'"):
        results.read_stored(path)["config"]["seed"]


# ------------------------------------------------------------------ reuse, refuse or make
IDENTITY = {
    "config": {"dtype": "float32", "seed": 0, "fractions": [0.5, 1.0], "revision": None},
    "fingerprint": "rows",
    "label_names": ["no", "yes"],
}


@pytest.mark.parametrize("ending", ["json", "safetensors"])
def test_a_damaged_result_or_state_is_refused_and_made_again_with_overwrite(tmp_path, ending):
    path = tmp_path / f"result.{ending}"
    path.write_text("damaged")
    assert results.find_result(path, IDENTITY, Run(overwrite=True)) is None
    with pytest.raises(UserError, match=path.name):
        results.find_result(path, IDENTITY, Run())
    with pytest.raises(UserError, match=path.name):
        results.check_state(path, IDENTITY, overwrite=False)
    results.check_state(path, IDENTITY, overwrite=True)
    assert not path.exists()


def test_every_setting_that_differs_or_is_lacking_is_named():
    stored = {"config": {"dtype": "bfloat16", "seed": 0, "fractions": [0.5]}}
    assert difference(stored, IDENTITY) == (
        "with other settings (dtype: 'bfloat16' there, 'float32' now; fractions: [0.5] there, [0.5, 1.0] now; "
        "revision: None there, None now)"
    )


@pytest.mark.parametrize(("part", "words"), [("fingerprint", "from other rows"), ("label_names", "with other classes")])
def test_each_part_of_an_identity_tells_results_apart_also_if_one_lacks_it(part, words):
    assert not difference(IDENTITY, IDENTITY) and difference(IDENTITY, IDENTITY | {part: "others"}) == words
    assert difference({name: value for name, value in IDENTITY.items() if name != part}, IDENTITY) == words


@pytest.mark.parametrize("name", ["dataset_name", "model_name", "adapter_dir", "tokenizer_name"])
def test_data_and_models_that_have_moved_are_told_by_their_content(name):
    """The fingerprint decides; but two names of the hub, and two files of other names, are two."""

    def compare(stored, asked, **parts):
        return difference({**IDENTITY, "config": {name: stored}}, {**IDENTITY, "config": {name: asked}, **parts})

    for pair in (("/old/fold", "/new/fold"), ("/old/fold", "fold"), ("fold", "/new/fold")):
        assert not compare(*pair) and "other rows" in compare(*pair, fingerprint="others")
    for stored, asked in (("/old/fold", "/old/other"), ("a/tokens", "b/tokens"), (None, "/new/fold")):
        assert f"{name}: {stored!r} there, {asked!r} now" in compare(stored, asked)


def test_settings_left_out_are_those_of_the_moments_and_given_ones_that_differ_are_refused(tmp_path):
    there = {"dtype": "bfloat16", "seed": 3, "max_length": 64, "text_column": "body"}
    path = tmp_path / "moments" / "m" / "d" / "train.safetensors"
    results.save_tensors(path, {}, {"config": result_settings(configure(cache, **there))})
    found = all_settings(results.settings_from_moments(configure(K_sweep, seed=3), path))
    assert {name: found[name] for name in there} == there and found["adapter_dir"] is None
    with pytest.raises(UserError, match="other settings") as raised:
        results.settings_from_moments(configure(K_sweep, seed=4, max_length=64, text_column="title"), path)
    message = str(raised.value)
    assert "seed: 3 there, 4 now" in message and "text_column: 'body' there, 'title' now" in message
    assert "dtype" not in message and "max_length" not in message and str(path) in message
    config = configure(K_sweep, seed=4)
    assert results.settings_from_moments(config, tmp_path / "none.safetensors") is config


# ------------------------------------------------------------------ whole or not at all, one run at a time
def test_what_a_dead_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = 2**22 + 1  # no process has this number
    names = {f"result.bin.{os.getppid()}@{results.MACHINE}.tmp", f"result.bin.{dead}@elsewhere.tmp"}
    for name in (f"result.bin.{dead}@{results.MACHINE}.tmp", f"a.{dead}@{results.MACHINE}.tmp", *names):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".tmpAbC123").write_bytes(b"half")
    with results.write_atomically(tmp_path / "result.bin") as path:
        path.write_bytes(b"whole")
        path.with_name(".tmpAbC123").write_bytes(b"half")  # of a library
    assert {path.name for path in tmp_path.iterdir()} == {*names, "result.bin"}
    with pytest.raises(UserError, match="it is a folder"):
        results.check_writable(tmp_path)


def test_a_full_disk_under_safetensors_is_said_as_any_other(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("utils.results.save_file", full)
    with pytest.raises(OSError, match=r"No space left.*a\.safetensors") as raised:
        results.save_tensors(tmp_path / "a.safetensors", {}, {})
    assert raised.value.errno == errno.ENOSPC and not any(tmp_path.iterdir())


@pytest.mark.parametrize("is_link", [False, True])
def test_a_folder_replaces_a_folder_or_a_link_to_one_and_a_failure_leaves_it(tmp_path, is_link):
    folder, before = tmp_path / "adapter", tmp_path / ("somebodys" if is_link else "adapter")
    before.mkdir()
    (before / "file").write_text("theirs")
    if is_link:
        folder.symlink_to(before)
    with pytest.raises(KeyError), results.write_atomically(folder) as temporary:
        temporary.mkdir()
        raise KeyError
    assert (folder / "file").read_text() == "theirs"
    with results.write_atomically(folder) as temporary:
        temporary.mkdir()
        (temporary / "other").write_text("ours")
    assert [path.name for path in folder.iterdir()] == ["other"] and not folder.is_symlink()
    assert not is_link or (before / "file").read_text() == "theirs"


def test_a_second_run_of_a_result_waits_and_then_finds_it(tmp_path):
    path, found = tmp_path / "new" / "result.json", []

    def run() -> None:
        with results.one_run_at_a_time(path):
            found.append(results.read_stored(path))

    second = threading.Thread(target=run)
    with results.one_run_at_a_time(path):
        second.start()
        second.join(0.3)
        assert not found
        results.save_json(path, {"score": 1})
    second.join(10)
    assert found == [{"score": 1}] and [*path.parent.iterdir()] == [path]
