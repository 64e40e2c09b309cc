"""Files of results say when they are not what was written: tensors, their header, JSON."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import cache
from tests.conftest import configure, run_in_process
from utils.script import UserError, load_json, replace_folder, save_json
from utils.tensor_files import FORMAT_VERSION, as_bytes, open_tensors, save_tensors

TENSORS = {
    "stack": [torch.arange(6.0).reshape(2, 3) + layer for layer in range(3)],
    "whole": torch.linspace(0, 1, 7, dtype=torch.float64),
    "short": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "counts": torch.tensor([3, 1, 2]),
    "number": torch.tensor(0.25),
    "none": torch.zeros(0, 4),
}
METADATA = {"format_version": FORMAT_VERSION, "config": {"seed": 0}, "name": "ä"}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors") / "file.safetensors"
    save_tensors(path, TENSORS, METADATA)
    return path


def read_all(path) -> dict[str, torch.Tensor]:
    with open_tensors(path) as (file, _):
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict


def test_what_is_written_comes_back_whole_and_by_layers_as_safetensors_reads_it(written):
    found, plain = read_all(written), load_file(written)
    assert found.keys() == plain.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        expected = torch.stack(tensor) if isinstance(tensor, list) else tensor
        assert torch.equal(found[name], expected) and torch.equal(plain[name], expected)
        assert found[name].dtype == expected.dtype
    with open_tensors(written) as (file, metadata):
        assert metadata == METADATA
        stack = file.get_slice("stack")
        assert stack.get_shape() == (3, 2, 3) and torch.equal(stack[1], TENSORS["stack"][1])
        assert torch.equal(file.get_slice("whole")[2:4], TENSORS["whole"][2:4])
        with pytest.raises(UserError, match=r"file\.safetensors has no other"):
            file.get_slice("other")


@given(st.data())
def test_a_changed_byte_is_found_by_whoever_reads_it(written, data):
    content = bytearray(written.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    place = data.draw(st.integers(header, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    damaged = written.with_name("changed.safetensors")
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"changed\.safetensors is damaged \(\w+ is not what was written\)"):
        read_all(damaged)
    for layer in range(3):  # the layer that was changed, and no other
        with open_tensors(damaged) as (file, _):
            if as_bytes(load_file(damaged)["stack"][layer]) != as_bytes(TENSORS["stack"][layer]):
                with pytest.raises(UserError, match="stack is not"):
                    file.get_slice("stack")[layer]
            else:
                file.get_slice("stack")[layer]


@given(st.data())
def test_a_changed_byte_of_the_header_is_found(written, data):
    content = bytearray(written.read_bytes())
    place = data.draw(st.integers(0, 7 + int.from_bytes(content[:8], "little")))
    before = content[place]
    content[place] = data.draw(st.integers(0, 255).filter(lambda byte: byte != before))
    damaged = written.with_name("header.safetensors")
    damaged.write_bytes(content)
    try:
        found = read_all(damaged)
    except UserError as error:
        assert str(damaged) in str(error)
    else:  # a byte that says nothing, such as a blank
        assert all(torch.equal(found[name], tensor) for name, tensor in load_file(written).items())


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.dictionaries(st.text().filter(lambda name: name != "seal"), VALUES, min_size=1, max_size=4), st.data())
def test_json_comes_back_and_a_changed_entry_is_found(tmp_path_factory, content, data):
    path = tmp_path_factory.mktemp("json") / "result.json"
    save_json(path, content)
    assert load_json(path) == content
    save_json(path, json.loads(path.read_text()))  # with the seal of the first time
    assert load_json(path) == content
    name = data.draw(st.sampled_from(sorted(content)))
    changed = json.loads(path.read_text()) | {name: data.draw(VALUES)}
    path.write_text(json.dumps(changed))
    if json.dumps(changed[name], sort_keys=True) != json.dumps(content[name], sort_keys=True):
        with pytest.raises(UserError, match=r"result\.json is no whole result: it was changed"):
            load_json(path)


@pytest.mark.parametrize(("split", "other"), [("train", "test"), ("test", "train")])
def test_of_two_files_the_damaged_one_is_named_with_its_command(
    model_dirs, rows_path, tmp_path, monkeypatch, split, other
):
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path), "results_dir": tmp_path}
    for each in ("train", "test"):
        cache.main(configure(cache, **names, split=each))
    path = cache.config_path(configure(cache, **names, split=split))
    tensors, metadata = load_file(path), safe_open(path, framework="pt").metadata()
    options = [word for name, value in names.items() for word in (f"--{name}", value)]
    for damage in ("lacking", "not finite"):
        changed = {name: tensor for name, tensor in tensors.items() if name != "pooled_second_moment"}
        if damage == "not finite":
            changed["pooled_second_moment"] = tensors["pooled_second_moment"] * torch.nan
        save_file(changed, path, metadata)
        message = run_in_process(monkeypatch, "K_sweep.py", *options, "--no_picture")
        assert f"/{split}.safetensors is damaged" in message and f"{other}.safetensors" not in message
        assert f"Run cache.py --split {split} with --overwrite" in message
    assert run_in_process(monkeypatch, "cache.py", *options, "--split", split, "--overwrite") == 0
    assert run_in_process(monkeypatch, "K_sweep.py", *options, "--no_picture") == 0


def test_a_full_disk_under_safetensors_is_said_as_any_other(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "old").touch()
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(OSError, match="No space left") as raised, replace_folder(tmp_path / "adapter"):
        raise full
    assert raised.value.errno == 28 and (tmp_path / "adapter" / "old").is_file()
    with pytest.raises(SafetensorError, match="other"), replace_folder(tmp_path / "adapter"):
        raise SafetensorError("other")
