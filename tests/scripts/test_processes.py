"""cache.py and training in many processes: the numbers of one, every text once, and one sentence for a mistake."""

import contextlib
import itertools
import json
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cache
import from_scratch
import K_sweep
import lora_finetuning
from tests.conftest import configure, flags, load_moments, make_texts, write_rows
from tests.processes import exit_codes, start
from utils.models.tokens import TokenizedTexts
from utils.parallel import connect
from utils.script import UserError
from utils.settings import with_values

OPTIONS = {"tokens_per_batch": 96, "product_dtype": "float64", "save_pooled": "all", "folds": "all"}


def run_cache(config, size: int, folder) -> list[list[int]]:
    """Runs cache.py in so many processes; returns the rows of the texts that each ran."""

    def run(rank: int) -> None:
        rows, pad = [], TokenizedTexts.pad

        def counted(tokens, indices):
            rows.extend(indices.tolist())
            return pad(tokens, indices)

        TokenizedTexts.pad = counted
        cache.main(config)
        (folder / f"{rank}.json").write_text(json.dumps(rows))

    assert exit_codes(start(run, size)) == [0] * size
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(size)]


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks so small that each process gets some of the few texts of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "TOKENS_PER_BLOCK", 300)
        yield


@pytest.mark.parametrize(("size", "product_dtype"), [(2, "float32"), (3, "float64")])
def test_many_processes_give_the_numbers_of_one(names, tmp_path, size, product_dtype):
    """Processes get whole blocks, so that each sum in float32 is the same number in every process."""
    config = configure(cache, **names, **OPTIONS | {"product_dtype": product_dtype})
    cache.main(with_values(config, results_dir=tmp_path / "one"))
    ran = run_cache(with_values(config, results_dir=tmp_path / "many"), size, tmp_path)
    assert sorted(itertools.chain(*ran)) == list(range(168)) and all(ran)
    expected, found = (load_moments(next((tmp_path / name).rglob("train.safetensors"))) for name in ("one", "many"))
    assert expected.keys() == found.keys()
    largest = expected["prefix_second_moment"].abs().amax((1, 2), keepdim=True)
    for name, value in expected.items():
        # the errors of the products are rounding themselves: compared with the size of the moment
        scale = largest if name.endswith("_error") else value.abs().amax()
        assert ((found[name] - value).abs() <= 1e-12 * scale).all(), name
    pooled = [np.load(next(folder.rglob("*.pooled.npy"))) for folder in (tmp_path / "one", tmp_path / "many")]
    assert np.array_equal(*pooled)


def test_a_process_without_texts_changes_nothing(names, tmp_path):
    rows = [{"text": text, "label": f"class {i % 2}"} for i, text in enumerate(make_texts(12, longest=4))]
    names = names | {"dataset_name": str(write_rows(tmp_path / "rows.jsonl", rows)), "split": "all"}
    cache.main(configure(cache, **names, **OPTIONS, results_dir=tmp_path / "one"))
    three = configure(cache, **names, **OPTIONS, results_dir=tmp_path / "three")
    assert sorted(map(len, run_cache(three, 3, tmp_path))) == [0, 0, 12]
    expected, found = (load_file(next((tmp_path / name).rglob("all.safetensors"))) for name in ("one", "three"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_a_mistake_in_one_process_ends_all_with_one_sentence(names, tmp_path):
    def fail(*_):
        raise UserError("the states of this process are gone")

    def run(rank: int) -> None:
        if rank == 1:
            cache.visit_hidden_states = fail
        sys.argv = ["cache.py", *flags(names | {"tokens_per_batch": 96, "results_dir": tmp_path / "results"})]
        cache.run_script(cache.main, cache.Config, None, share_work=True)

    codes = exit_codes(start(run, 2, tmp_path / "said", whole=True))
    said = (tmp_path / "said").read_text()
    assert codes == [1, 1] and said.count("error") == 1 and "the states of this process are gone" in said, said
    assert "Traceback" not in said and not list(tmp_path.rglob("*.safetensors"))


def test_a_script_for_one_process_refuses_several(tmp_path):
    def run(rank: int) -> None:
        sys.argv = ["K_sweep.py"]
        K_sweep.run_script(K_sweep.main, K_sweep.Config, None)

    assert exit_codes(start(run, 2, tmp_path / "said", whole=True)) == [1, 1]
    said = (tmp_path / "said").read_text()
    assert said == "error: K_sweep.py runs in one process, not in 2. Start it with: python K_sweep.py\n"


def train(script, size: int, folder, *more, **options) -> list[int | None]:
    """A training script in so many processes; their output goes into `folder`."""
    options |= {"results_dir": folder / "results", "device": "cpu", "dtype": "float32", "dropout": 0.0}
    options |= {"batch_size": 4, "num_steps": 7, "steps_per_evaluation": 4, "tokens_per_batch": 96}
    folder.mkdir(exist_ok=True)

    def run(rank: int) -> None:
        sys.argv = [f"{script.__name__}.py", *flags(options | {"learning_rate": 1e-3}), *more]
        with open(folder / "printed", "a", buffering=1) as printed, contextlib.redirect_stdout(printed):
            script.run_script(script.main, script.Config, None, share_work=True)

    return exit_codes(start(run, size, folder / "said", whole=True), 120)


@pytest.fixture(scope="module")
def trained(names, tmp_path_factory):
    """The folders of a LoRA run in one process, and in two that also take NTPS before and after."""
    folders = [tmp_path_factory.mktemp(f"lora{size}") for size in (1, 2)]
    for size, folder, more in ((1, folders[0], ()), (2, folders[1], ("--ntps_after",))):
        codes = train(lora_finetuning, size, folder, *more, lora_dropout=0.0, **names)
        assert codes == [0] * size, (folder / "said").read_text()
    return folders


def read(folder, pattern: str):
    """The one result of this name."""
    [path] = (folder / "results").glob(pattern)
    return load_file(path) if path.suffix == ".safetensors" else json.loads(path.read_text())


@pytest.mark.slow
def test_two_processes_train_the_adapter_of_one_and_print_every_path_once(trained):
    for name in ("adapter/adapter_model.safetensors", "head.safetensors"):
        expected, found = (read(folder, f"lora/*/*/{name}") for folder in trained)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5)
    expected, found = (read(folder, "lora/*/*/metrics.json") for folder in trained)
    assert found["last"] == pytest.approx(expected["last"], rel=1e-4)
    assert (found["num_processes"], found["texts_per_step"], found["num_steps"]) == (2, 4, 7)
    assert list(read(trained[1], "lora/*/*/before_after.json")["ntps"])  # with --ntps_after
    printed = (trained[1] / "printed").read_text().splitlines()
    paths = [line for line in printed if line.startswith("/") and line.endswith(".json")]
    assert len(set(paths)) == len(paths) == 5 and printed[-1].endswith("before_after.json")


def test_two_processes_train_all_weights(names, tmp_path):
    assert train(from_scratch, 2, tmp_path, **names) == [0, 0]
    [path] = (tmp_path / "results").glob("from_scratch/*/*/metrics.json")
    assert (tmp_path / "printed").read_text().count(str(path)) == 1
    assert json.loads(path.read_text())["last"]["step"] == 7 and len(list(path.parent.glob("*/model.safetensors"))) == 1


def test_processes_that_cannot_meet_say_so_in_one_line(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as said:
        connect()
    begin = "error: WORLD_SIZE says that there are 2 processes, and they cannot meet"
    assert re.fullmatch(rf"{begin} \(.*RANK expected.*\)\. Start them with torchrun\.", str(said.value))
