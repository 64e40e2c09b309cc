"""A run of cache.py that is killed, whenever, goes on and gives the result of an uninterrupted one bit for bit."""

import errno
import itertools
import os
import signal
import time

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cache
import utils.algebra.partial
import utils.results
from tests.conftest import configure
from tests.processes import exit_codes, start
from utils.algebra.partial import PartialPass
from utils.results import read_stored
from utils.script import UserError
from utils.settings import with_values


def configured(names, folder):
    options = {"tokens_per_batch": 120, "minutes_per_state": 0.0, "save_pooled": "all", "product_dtype": "float32"}
    return configure(cache, **names, **options, results_dir=folder)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks that end within the few texts of a test; the sums are written after each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "TOKENS_PER_BLOCK", 250)
        yield


def results(folder) -> dict[str, bytes]:
    """Every file of the results; nothing unfinished is beside them."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    assert {path.name for path in files} <= {"train.safetensors", "train.pooled.npy"}
    return {path.name: path.read_bytes() for path in files}


def partials(folder) -> list:
    """The sums of unfinished passes."""
    return sorted(folder.rglob("*.partial-*-of-*.safetensors"))


@pytest.fixture(scope="module")
def whole(names, tmp_path_factory):
    """The files of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    cache.main(configured(names, folder))
    return results(folder)


@pytest.fixture
def config(names, tmp_path):
    """The settings of the same result in a folder of its own."""
    return configured(names, tmp_path)


def end_after(config, num_calls: int, owner=PartialPass, name: str = "save", number: int = signal.SIGKILL) -> None:
    """Runs cache.py in a process that sends itself a signal after so many calls of a function, and ends by it.

    `save` writes the sums after each block.
    """

    def run(rank: int) -> None:
        call, calls = getattr(owner, name), itertools.count(1)

        def counted(*arguments):
            found = call(*arguments)
            if next(calls) == num_calls:
                os.kill(os.getpid(), number)
            return found

        setattr(owner, name, counted)
        cache.main(config)

    assert exit_codes(start(run)) == [143 if number == signal.SIGTERM else -number]


@pytest.mark.slow
@pytest.mark.parametrize(("size", "num_kills"), [(1, 10), (2, 3)])
def test_a_run_killed_at_random_gives_the_uninterrupted_result(names, tmp_path, size, num_kills):
    whole = configured(names, tmp_path / "whole")
    begin = time.monotonic()
    assert exit_codes(start(lambda rank: cache.main(whole), size)) == [0] * size
    usual = time.monotonic() - begin
    random, kills, finished = np.random.default_rng(size), 0, 0
    while kills < num_kills:
        folder = tmp_path / str(finished)
        killed, codes = configured(names, folder), [1]
        while any(codes):
            started = start(lambda rank, killed=killed: cache.main(killed), size)
            is_killed = kills < num_kills  # else it runs to the end
            if is_killed:
                time.sleep(random.uniform(0.2, 1) * usual)
                for process in started:
                    process.kill()
            codes = exit_codes(started)
            assert is_killed or not any(codes)
            kills += any(codes)
        finished += 1
        assert results(folder) == results(tmp_path / "whole")


@pytest.mark.parametrize(
    ("ending", "minutes_per_state"),
    [
        ((2, PartialPass, "save", signal.SIGKILL), 0.0),
        ((7, cache, "visit_hidden_states", signal.SIGTERM), 60.0),  # two calls by the self-check
        ((1, utils.algebra.partial, "pooled_path", signal.SIGKILL), 0.0),
    ],
    ids=["between two blocks", "SIGTERM", "between its two results"],
)
def test_an_ended_run_goes_on(config, tmp_path, whole, capsys, ending, minutes_per_state):
    config = with_values(config, minutes_per_state=minutes_per_state)
    end_after(config, *ending)
    [partial] = partials(tmp_path)
    num_batches = read_stored(partial)["num_batches"]
    cache.main(config)
    assert num_batches > 4 and f"going on from {partial}: {num_batches} batches are done" in capsys.readouterr().out
    assert results(tmp_path) == whole


@pytest.fixture
def partial(config, tmp_path):
    """The sums of a run that was killed after some blocks."""
    end_after(config, 2)
    [path] = partials(tmp_path)
    return path


def test_damaged_sums_are_refused_with_the_command_that_fixes_it(config, partial, tmp_path, whole):
    tensors, metadata = load_file(partial), safe_open(partial, framework="pt").metadata()
    tensors["layer.1.prefix_second_moment"].view(-1)[-1] += 1
    save_file(tensors, partial, metadata)
    with pytest.raises(UserError, match=f"{partial.name}.*--overwrite"):
        cache.main(config)
    cache.main(with_values(config, overwrite=True))
    assert results(tmp_path) == whole


def test_sums_of_other_settings_are_refused_and_named(config, partial):
    with pytest.raises(UserError, match=rf"{partial.name} was made with other settings \(pooling: 'mean' there"):
        cache.main(with_values(config, pooling="last"))
    assert partial.is_file()


@pytest.mark.parametrize("change", ["tokens_per_batch", "pooled"])
def test_sums_that_cannot_be_continued_are_left(config, partial, tmp_path, capsys, change):
    other = with_values(config, tokens_per_batch=64) if change == "tokens_per_batch" else config
    if change == "pooled":
        partial.with_name("train.pooled.partial.npy").unlink()
    cache.main(other)
    printed = capsys.readouterr().out
    assert "starting anew" in printed and change in printed
    found = results(tmp_path)
    cache.main(with_values(other, results_dir=tmp_path / "whole"))
    assert found == results(tmp_path / "whole")


@pytest.mark.parametrize("word", ["train.safetensors", "pooled", ".partial-"])
def test_without_space_both_old_results_stay_and_nothing_is_done_twice(
    config, tmp_path, monkeypatch, capsys, whole, word
):
    def unless_full(write, name_of):
        def writing(*arguments):
            if word in (name := str(name_of(*arguments))):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
            return write(*arguments)

        return writing

    cache.main(with_values(config, pooling="last"))
    before, again = results(tmp_path), with_values(config, overwrite=True)
    with monkeypatch.context() as patch:
        reserve = unless_full(os.posix_fallocate, lambda descriptor, *_: os.readlink(f"/proc/self/fd/{descriptor}"))
        patch.setattr(os, "posix_fallocate", reserve)
        patch.setattr(utils.results, "save_file", unless_full(utils.results.save_file, lambda _, path, *__: path))
        with pytest.raises(OSError, match="No space left"):
            cache.main(again)
    kept = {path.name: path.read_bytes() for path in tmp_path.rglob("train.*") if path.name in before}
    assert kept == before
    capsys.readouterr()
    cache.main(again)
    assert ("going on from" in capsys.readouterr().out) == (word == "train.safetensors")
    assert results(tmp_path) == whole
