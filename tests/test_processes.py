"""cache.py in many processes: the numbers of one, every text once, and one sentence for a mistake."""

import itertools
import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import cache
import K_sweep
from tests.conftest import configure, make_texts, write_rows
from tests.processes import exit_codes, start
from utils.batches import share_of, token_steps
from utils.io import UserError
from utils.models import TokenizedTexts
from utils.scores import SCORES
from utils.settings import with_values


def settings(model_dirs, rows, folder, **more):
    names = {"model_name": str(model_dirs["llama"]), "dataset_name": str(rows), "results_dir": folder}
    options = {"tokens_per_batch": 96, "product_dtype": "float64", "save_pooled": "all", "folds": "all"}
    return configure(cache, **names, **options, **more)


def moments(folder) -> dict[str, torch.Tensor]:
    [path] = folder.rglob("train.safetensors")
    return load_file(path)


def sweep(config) -> dict:
    settings = {"model": config.model, "data": config.data, "run": config.run}
    return K_sweep.run(with_values(K_sweep.Config(**settings), num_null_draws=2, picture=False))


def run_cache(config, size: int, counts=None) -> list[int | None]:
    """cache.py in so many processes; the texts that each ran are written as <counts>/<rank>.json."""

    def run(rank: int) -> None:
        rows, pad = [], TokenizedTexts.pad

        def counted(tokens, indices):
            rows.extend(indices.tolist())
            return pad(tokens, indices)

        TokenizedTexts.pad = counted
        cache.main(config)
        if counts is not None:
            (counts / f"{rank}.json").write_text(json.dumps(rows))

    return exit_codes(start(run, size))


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks so small that each process gets some of the few texts of a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "PAIRS_PER_BLOCK", 300)
        yield


@pytest.fixture(scope="module")
def alone(model_dirs, rows_path, tmp_path_factory):
    """The result of one process, and its config."""
    config = settings(model_dirs, rows_path, tmp_path_factory.mktemp("alone"))
    cache.main(config)
    return config


@pytest.mark.parametrize("size", [2, 3])
def test_many_processes_give_the_numbers_of_one(alone, model_dirs, rows_path, tmp_path, size):
    config = settings(model_dirs, rows_path, tmp_path)
    assert run_cache(config, size, tmp_path) == [0] * size
    expected, found = moments(alone.run.results_dir), moments(tmp_path)
    assert expected.keys() == found.keys()
    largest = expected["prefix_second_moment"].abs().amax((1, 2), keepdim=True)
    for name, value in expected.items():
        # the errors of the products are rounding themselves: measured by what they are errors of
        scale = largest if name.endswith("_error") else value.abs().amax()
        assert ((found[name] - value).abs() <= 1e-12 * scale).all(), name
    folders = (alone.run.results_dir, tmp_path)
    expected, found = (load_file(next(folder.rglob("*.pooled.safetensors"))) for folder in folders)
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    ran = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(size)]
    assert sorted(itertools.chain(*ran)) == list(range(168)) and all(ran)
    scores = [sweep(c) for c in (alone, config)]
    for one, other in zip(*(result["layers"] for result in scores), strict=True):
        for name in SCORES:
            np.testing.assert_allclose(other[name], one[name], rtol=0, atol=1e-9)


def test_a_process_without_texts_changes_nothing(model_dirs, tmp_path):
    rows = [{"text": text, "label": f"class {i % 2}"} for i, text in enumerate(make_texts(12, longest=4))]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    one, three = (settings(model_dirs, path, tmp_path / name, split="all") for name in ("one", "three"))
    cache.main(one)
    assert run_cache(three, 3, tmp_path) == [0, 0, 0]
    assert sorted(len(json.loads((tmp_path / f"{rank}.json").read_text())) for rank in range(3)) == [0, 0, 12]
    expected, found = (load_file(next((tmp_path / name).rglob("all.safetensors"))) for name in ("one", "three"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64])
def test_shares_hold_every_text_once_and_are_of_like_size(size):
    lengths = np.random.default_rng(0).integers(1, 200, 3000)
    blocks = token_steps(lengths, 1024, 2048)
    assert all((lengths[np.concatenate([step.rows for step in block])] - 1).sum() >= 2048 for block in blocks[:-1])
    shares = [share_of(blocks, lengths, rank, size) for rank in range(size)]
    rows = [np.concatenate([step.rows for step in share] or [np.arange(0)]) for share in shares]
    assert sorted(np.concatenate(rows)) == list(range(3000))
    tokens = [int(lengths[of].sum()) for of in rows]
    assert max(tokens) - min(tokens) < 2 * 3100  # two blocks
    assert all(share[-1].ends_block for share in shares if share)


def test_float32_products_are_those_of_one_process(model_dirs, rows_path, tmp_path):
    """Whole blocks are dealt out, so that each sum in float32 is the same number wherever it is taken."""
    names = {"model_name": str(model_dirs["llama"]), "dataset_name": str(rows_path), "tokens_per_batch": 96}
    one, two = (configure(cache, **names, product_dtype="float32", results_dir=tmp_path / n) for n in ("one", "two"))
    cache.main(one)
    assert run_cache(two, 2) == [0, 0]
    expected, found = (moments(tmp_path / name)["prefix_second_moment"] for name in ("one", "two"))
    assert ((found - expected).abs() <= 1e-12 * expected.abs().amax()).all()


# ------------------------------------------------------------------ mistakes
def test_a_mistake_in_one_process_ends_all_with_one_sentence(model_dirs, rows_path, tmp_path):
    def run(rank: int) -> None:
        def fail(*_):
            raise UserError("the states of this process are gone")

        if rank == 1:
            cache.visit_hidden_states = fail
        arguments = ["--model_name", model_dirs["llama"], "--dataset_name", rows_path, "--tokens_per_batch", 96]
        sys.argv = ["cache.py", *map(str, arguments), "--results_dir", str(tmp_path / "results")]
        cache.run_script(cache.main, cache.Config, None, share_work=True)

    codes = exit_codes(start(run, 2, tmp_path / "said", whole=True))
    said = (tmp_path / "said").read_text()
    assert codes == [1, 1] and said.count("error") == 1 and "the states of this process are gone" in said, said
    assert "Traceback" not in said and not list(tmp_path.rglob("*.safetensors"))


def test_a_mistake_of_all_is_said_once(model_dirs, tmp_path):
    def run(rank: int) -> None:
        sys.argv = ["cache.py", "--model_name", str(model_dirs["llama"]), "--dataset_name", "no_such_rows.jsonl"]
        cache.run_script(cache.main, cache.Config, None, share_work=True)

    codes = exit_codes(start(run, 3, tmp_path / "said", whole=True))
    said = (tmp_path / "said").read_text()
    assert codes == [1, 1, 1] and said.count("no_such_rows.jsonl") == 1 and said.count("error:") == 1, said


def test_a_script_for_one_process_refuses_several(tmp_path, monkeypatch):
    def run(rank: int) -> None:
        sys.argv = ["K_sweep.py"]
        K_sweep.run_script(K_sweep.main, K_sweep.Config, None)

    codes = exit_codes(start(run, 2, tmp_path / "said", whole=True))
    assert sorted(codes) == [0, 1]
    said = (tmp_path / "said").read_text()
    assert said == "error: K_sweep.py runs in one process, not in 2. Start it with: python K_sweep.py\n"
