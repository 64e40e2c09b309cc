"""A run of cache.py that is killed, whenever, goes on and gives the result of an uninterrupted one bit for bit."""

import errno
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

import cache
import utils.results
import utils.unfinished
from tests.conftest import configure, run_in_process
from tests.processes import exit_codes, start
from utils.script import UserError
from utils.settings import with_values
from utils.unfinished import open_locked


def settings(model_dirs, rows_path, folder, **more):
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path), "results_dir": folder}
    options = {"tokens_per_batch": 120, "minutes_per_state": 0.0, "save_pooled": "all", "product_dtype": "float32"}
    return configure(cache, **names, **options | more)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Blocks that end within the few texts of a test; states fall between them and inside of them."""
    monkeypatch.setattr(cache, "PAIRS_PER_BLOCK", 250)


def results(folder) -> dict[str, torch.Tensor]:
    """Every tensor of the results, by file and name; nothing unfinished is beside them."""
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name or ".state" in path.name]
    return load_results(folder)


def load_results(folder) -> dict[str, torch.Tensor]:
    found = {path.name: load_file(path) for path in folder.rglob("*.safetensors") if ".state" not in path.name}
    return {f"{file} {name}": tensor for file, tensors in found.items() for name, tensor in tensors.items()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(expected) > 20
    assert not [name for name, value in expected.items() if not torch.equal(found[name], value)]


def states(folder) -> list:
    return list(folder.rglob("*.state-*"))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_kills"), [(1, 10), (2, 4)])
def test_a_run_killed_at_random_gives_the_uninterrupted_result(model_dirs, rows_path, tmp_path, size, num_kills):
    whole = settings(model_dirs, rows_path, tmp_path / "whole")
    begin = time.monotonic()
    assert exit_codes(start(lambda rank: cache.main(whole), size)) == [0] * size
    usual = time.monotonic() - begin
    random, kills, finished = np.random.default_rng(size), 0, 0
    while kills < num_kills:
        folder = tmp_path / str(finished)
        killed = settings(model_dirs, rows_path, folder)
        codes = [1]
        while any(codes):
            started = start(lambda rank, killed=killed: cache.main(killed), size)
            if kills < num_kills:  # then to the end
                time.sleep(random.uniform(0.2, 1) * usual)
                for process in started:
                    process.kill()
            codes = exit_codes(started)
            kills += any(codes)
        finished += 1
        assert_equal(results(folder), results(tmp_path / "whole"))


@pytest.mark.parametrize("write", [0, 1])  # a busy machine has no time for more states in so short a pass
def test_a_run_killed_while_it_writes_goes_on(model_dirs, rows_path, tmp_path, write):
    """Killed half-way through the write of a state or of the result, after none or some whole ones."""
    whole, killed = (settings(model_dirs, rows_path, tmp_path / name) for name in ("whole", "killed"))

    def run(rank: int) -> None:
        save, seen = utils.results.save_file, []

        def dying(tensors, path, metadata):
            seen.append(path.name)
            if sum("state" in name for name in seen) > write:
                path.write_bytes(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
            save(tensors, path, metadata)

        utils.results.save_file = dying
        cache.main(killed)

    assert exit_codes(start(run)) == [-signal.SIGKILL]
    assert [path for path in tmp_path.rglob("*.tmp") if ".state-" in path.name]
    assert len(states(tmp_path)) == 1 + (write > 0)  # the half-written one, and a whole one
    cache.main(whole)
    cache.main(killed)
    assert_equal(results(tmp_path / "killed"), results(tmp_path / "whole"))


def test_sigterm_keeps_a_state_and_ends_with_143(model_dirs, rows_path, tmp_path, capsys):
    places, seldom = (tmp_path / "whole", tmp_path / "ended"), {"minutes_per_state": 60.0}
    whole, ended = (settings(model_dirs, rows_path, place, **seldom) for place in places)

    def run(rank: int) -> None:
        add_labels, seen = cache.MomentSums.add_labels, []

        def terminated(*arguments):
            add_labels(*arguments)
            seen.append(0)
            if len(seen) == 5:
                os.kill(os.getpid(), signal.SIGTERM)

        cache.MomentSums.add_labels = terminated
        cache.main(ended)

    assert exit_codes(start(run)) == [143]
    assert len(states(tmp_path)) == 1
    cache.main(whole)
    capsys.readouterr()
    cache.main(ended)
    assert ": 5 of " in capsys.readouterr().out
    assert_equal(results(tmp_path / "ended"), results(tmp_path / "whole"))


@pytest.mark.parametrize("moment", ["moments", "pooled states"])
def test_a_run_killed_between_its_two_results_goes_on(model_dirs, rows_path, tmp_path, capsys, moment):
    whole, killed = (settings(model_dirs, rows_path, tmp_path / name) for name in ("whole", "killed"))

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def run(rank: int) -> None:
        if moment == "moments":
            utils.unfinished.PooledFile.finish = die
        else:
            cache.remove_unfinished = die
        cache.main(killed)

    assert exit_codes(start(run)) == [-signal.SIGKILL]
    cache.main(whole)
    capsys.readouterr()
    cache.main(killed)
    assert ("going on from" if moment == "moments" else "reused") in capsys.readouterr().out
    assert_equal(results(tmp_path / "killed"), results(tmp_path / "whole"))


def test_what_killed_runs_of_other_numbers_of_processes_left_is_removed(interrupted, model_dirs):
    config, state = interrupted
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = state.with_name(f"train.state-2-of-2.safetensors.{dead.pid}@{utils.results.machine()}.tmp")
    elsewhere = state.with_name(f"train.state-2-of-2.safetensors.{dead.pid}@elsewhere.tmp")
    left.write_bytes(b"half")
    elsewhere.write_bytes(b"half")
    cache.main(with_values(config, save_pooled="none"))
    assert sorted(path.name for path in state.parent.iterdir()) == ["train.safetensors", elsewhere.name]


def test_a_second_run_of_the_same_pooled_states_is_refused(interrupted, capsys):
    """It would otherwise write its rows, of other settings, among those of the first."""
    config, state = interrupted
    [unfinished] = state.parent.glob("*.pooled.*")
    before, other = unfinished.read_bytes(), with_values(config, pooling="last", overwrite=True)
    with open_locked(unfinished):
        for second in (config, other):
            with pytest.raises(UserError, match=r"Another run is writing .*pooled\.safetensors too"):
                cache.main(second)
        assert unfinished.read_bytes() == before
    cache.main(other)
    assert results(config.run.results_dir)


# ------------------------------------------------------------------ states and results that cannot be used
@pytest.fixture
def interrupted(model_dirs, rows_path, tmp_path):
    """The config of a run that was killed after some batches, and its state."""
    config = settings(model_dirs, rows_path, tmp_path / "results")

    def run(rank: int) -> None:
        os.kill(os.getpid(), signal.SIGKILL) if states(tmp_path) else None

    def killed(rank: int) -> None:
        add_labels = cache.MomentSums.add_labels
        cache.MomentSums.add_labels = lambda *arguments: (add_labels(*arguments), run(rank))
        cache.main(config)

    assert exit_codes(start(killed)) == [-signal.SIGKILL]
    [state] = states(tmp_path)
    return config, state


@pytest.mark.parametrize("damage", ["empty", "truncated", "text", "foreign"])
def test_a_damaged_state_is_refused_with_what_fixes_it(interrupted, damage):
    config, state = interrupted
    content = state.read_bytes()
    damaged = {"empty": b"", "truncated": content[: len(content) // 2], "text": b"no tensors", "foreign": None}[damage]
    if damaged is None:
        utils.results.save_tensors(state, {"a": torch.zeros(1)}, {"of": "something else"})
    else:
        state.write_bytes(damaged)
    with pytest.raises(UserError, match=f"{state.name}.*--overwrite"):
        cache.main(config)
    cache.main(with_values(config, overwrite=True))
    assert results(config.run.results_dir)


@pytest.mark.parametrize("name", ["products.1", "pooled_mean.0", "fold_pooled_second_moment.0", "tq.2", "block.1"])
def test_a_state_with_a_changed_number_is_refused(interrupted, name):
    config, state = interrupted
    tensors, metadata = load_file(state), safe_open(state, framework="pt").metadata()
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, state, metadata)
    with pytest.raises(UserError, match=rf"{state.name} is damaged \({name} is not what was written\).*--overwrite"):
        cache.main(config)


@pytest.mark.parametrize("change", ["tensor", "shape", "dtype"])
def test_a_state_that_was_changed_is_refused(interrupted, change):
    config, state = interrupted
    tensors, kept = load_file(state), safe_open(state, framework="pt").metadata()
    if change == "tensor":
        del tensors["ta.1"]
    else:
        tensors["ta.1"] = tensors["ta.1"][..., :1].clone() if change == "shape" else tensors["ta.1"].float()
    save_file(tensors, state, kept)
    with pytest.raises(UserError, match=f"{state.name} is damaged.*--overwrite"):
        cache.main(config)
    cache.main(with_values(config, overwrite=True))
    assert results(config.run.results_dir)


def test_a_state_of_other_settings_is_refused_and_named(interrupted):
    config, state = interrupted
    with pytest.raises(UserError, match=rf"{state.name} was made with other settings \(pooling: 'mean' there, 'last'"):
        cache.main(with_values(config, pooling="last"))
    assert state.is_file()


def test_a_state_of_another_way_to_the_same_numbers_is_left(interrupted, model_dirs, rows_path, tmp_path, capsys):
    config, _ = interrupted
    cache.main(with_values(config, tokens_per_batch=64))
    assert "with another num_steps, tokens_per_batch: this run starts from the beginning" in capsys.readouterr().out
    cache.main(settings(model_dirs, rows_path, tmp_path / "whole", tokens_per_batch=64))
    assert_equal(results(config.run.results_dir), results(tmp_path / "whole"))


def test_a_state_whose_pooled_states_are_gone_is_left(interrupted, model_dirs, rows_path, tmp_path, capsys):
    config, state = interrupted
    [pooled] = state.parent.glob("*.pooled.*")
    pooled.unlink()
    cache.main(config)
    assert "going on" not in capsys.readouterr().out
    cache.main(settings(model_dirs, rows_path, tmp_path / "whole"))
    assert_equal(results(config.run.results_dir), results(tmp_path / "whole"))


def full_disk(monkeypatch, word: str) -> None:
    """No space for files with this word in their names."""
    save, reserve = utils.results.save_file, utils.unfinished.reserve

    def refuse_tensors(tensors, path, metadata):
        if word in path.name:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        save(tensors, path, metadata)

    def refuse(file, num_bytes):
        if word in file.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), file.name)
        reserve(file, num_bytes)

    monkeypatch.setattr(utils.results, "save_file", refuse_tensors)
    monkeypatch.setattr(utils.unfinished, "reserve", refuse)


def test_without_space_for_a_state_the_pass_goes_on(model_dirs, rows_path, tmp_path, monkeypatch, capsys):
    full, whole = (settings(model_dirs, rows_path, tmp_path / name) for name in ("full", "whole"))
    cache.main(whole)
    full_disk(monkeypatch, ".state-")
    cache.main(full)
    assert_equal(results(tmp_path / "full"), results(tmp_path / "whole"))


@pytest.mark.parametrize("word", ["train.safetensors", "pooled"])
def test_without_space_for_pooled_states_or_moments_both_old_ones_stay(
    model_dirs, rows_path, tmp_path, monkeypatch, capsys, word
):
    config = settings(model_dirs, rows_path, tmp_path / "results")
    cache.main(config)
    before, other = results(config.run.results_dir), with_values(config, pooling="last")
    with monkeypatch.context() as patch:
        full_disk(patch, word)
        with pytest.raises(OSError, match="No space"):
            cache.main(with_values(other, overwrite=True))
        assert_equal(load_results(config.run.results_dir), before)
    capsys.readouterr()
    cache.main(with_values(other, overwrite=True))
    assert ("going on from" in capsys.readouterr().out) == (word == "train.safetensors")  # nothing is done twice
    cache.main(with_values(other, results_dir=tmp_path / "whole"))
    assert_equal(results(config.run.results_dir), results(tmp_path / "whole"))


def test_without_space_for_the_result_the_old_one_stays(model_dirs, rows_path, tmp_path, monkeypatch):
    config = settings(model_dirs, rows_path, tmp_path, save_pooled="none")
    cache.main(config)
    [path] = tmp_path.rglob("*.safetensors")
    before = path.read_bytes()
    full_disk(monkeypatch, "train.safetensors")
    arguments = ["--model_name", config.model.model_name, "--dataset_name", rows_path, "--results_dir", tmp_path]
    code = run_in_process(monkeypatch, "cache.py", *arguments, "--overwrite", "--pooling", "last")
    assert code.startswith("error: cannot write") and path.read_bytes() == before
