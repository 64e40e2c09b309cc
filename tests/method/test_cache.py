"""cache.py: the streamed moments equal the definition, whatever the batches; and its command line."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import cache
from tests.conftest import (
    configure,
    load_pooled_states,
    make_texts,
    run_command,
    run_in_process,
    stacked,
)
from utils.algebra.moments import describe_texts, load_rounding
from utils.data.load import LabelledTexts, load_texts
from utils.models.tokens import tokenize
from utils.results import read_identity
from utils.script import UserError
from utils.settings import with_values


def dense_moments(model, token_ids: list[list[int]], targets: torch.Tensor, pooling: str) -> dict[str, torch.Tensor]:
    """The moments text by text from the definition, with the triangular matrices L1, L2 of the paper, in float64."""
    num_layers, d, c = model.config.num_hidden_layers + 1, model.config.hidden_size, targets.shape[1]
    shapes = {"M": (d, d), "B": (d, c), "C0": (d, d), "C1": (d, d)}
    total = {name: torch.zeros(num_layers, *shape, dtype=torch.float64) for name, shape in shapes.items()}
    for ids, y in zip(token_ids, targets, strict=True):
        with torch.no_grad():
            states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        length = len(ids)
        prefix_sum = torch.ones(length, length - 1, dtype=torch.float64).triu()
        shift = torch.cat([torch.zeros(1, length - 1), torch.eye(length - 1)]).double()
        for layer, state in enumerate(states):
            x = state[0].double().T  # (d, T)
            m = x[:, -1] if pooling == "last" else x.mean(1)
            total["M"][layer] += torch.outer(m, m)
            total["B"][layer] += torch.outer(m, y)
            total["C0"][layer] += x @ prefix_sum @ prefix_sum.T @ x.T
            total["C1"][layer] += x @ prefix_sum @ shift.T @ x.T
    return {name: value / len(token_ids) for name, value in total.items()}


NAMES = {
    "M": "pooled_second_moment",
    "B": "pooled_label_cross_moment",
    "C0": "prefix_second_moment",
    "C1": "prefix_next_cross_moment",
}


def setup(model_dir, texts: list[str], regression: bool = False):
    """A model in float64, so that a difference is a mistake and not rounding; tokens; labels; their folds, of 3."""
    model = AutoModel.from_pretrained(model_dir, dtype=torch.float64).eval()
    tokens = tokenize(texts, AutoTokenizer.from_pretrained(model_dir), model.config)
    random = np.random.default_rng(1)
    labels = random.normal(size=len(texts)) if regression else random.integers(0, 3, len(texts))
    names = [] if regression else ["a", "b", "c"]
    data = LabelledTexts(texts=texts, labels=labels, label_names=names, fingerprint="")
    return model, tokens, data, cache.assign_folds(texts, 3)


def token_lists(tokens) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens.token_ids, tokens.offsets[1:-1])]


@pytest.mark.parametrize("architecture", ["qwen2", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("texts_per_batch", [1, 3, 7])
def test_moments_equal_the_definition(model_dirs, architecture, pooling, texts_per_batch):
    texts = [*make_texts(20, seed=3, longest=12), "a", "e", "the"]  # one-token texts among them
    model, tokens, data, folds = setup(model_dirs[architecture], texts, regression=pooling == "last")
    assert tokens.lengths.min() == 1 and tokens.lengths.max() > 10
    budget = texts_per_batch * int(tokens.lengths.max())
    config = configure(cache, num_folds=3, pooling=pooling, product_dtype="float64", tokens_per_batch=budget)
    averages = stacked(cache.accumulate(model, tokens, data, folds, config))
    dense = dense_moments(model, token_lists(tokens), cache.one_hot_targets(data), pooling)
    for symbol, name in NAMES.items():
        scale = dense[symbol].abs().max()
        torch.testing.assert_close(averages[name] / scale, dense[symbol] / scale, rtol=0, atol=1e-12)


def test_every_further_sum_equals_the_definition(model_dirs):
    texts = make_texts(30, seed=5)
    model, tokens, data, folds = setup(model_dirs["qwen2"], texts)
    config = configure(cache, num_folds=3, folds="all", product_dtype="float64", tokens_per_batch=64)
    averages = stacked(cache.accumulate(model, tokens, data, folds, config))
    targets = cache.one_hot_targets(data)
    pooled, prefixes, following = [], [], []
    for ids in token_lists(tokens):
        with torch.no_grad():
            x = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        pooled.append(x.mean(0))
        prefixes.append(x.cumsum(0)[:-1].sum(0))
        following.append(x[1:].sum(0))
    m = torch.stack(pooled)
    expected = {
        "pooled_mean": m.mean(0),
        "prefix_mean": torch.stack(prefixes).mean(0),
        "next_mean": torch.stack(following).mean(0),
        "pooled_norm_fourth_power": m.norm(dim=1).pow(4).mean(),
        "pooled_norm_squared_pooled": (m.norm(dim=1).square()[:, None] * m).mean(0),
    }
    for name, value in expected.items():
        torch.testing.assert_close(averages[name][-1], value, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(averages["label_mean"], targets.mean(0))
    torch.testing.assert_close(averages["label_second_moment"], targets.T @ targets / len(texts))
    for fold in range(3):
        inside = torch.from_numpy(folds == fold)
        assert averages["fold_num_samples"][fold] == inside.sum()
        m_fold, y_fold = m[inside], targets[inside]
        torch.testing.assert_close(averages["fold_pooled_second_moment"][-1, fold], m_fold.T @ m_fold / len(m_fold))
        torch.testing.assert_close(
            averages["fold_pooled_label_cross_moment"][-1, fold], m_fold.T @ y_fold / len(m_fold)
        )
        torch.testing.assert_close(averages["fold_pooled_mean"][-1, fold], m_fold.mean(0))
        torch.testing.assert_close(averages["fold_label_mean"][fold], y_fold.mean(0))


def test_equal_texts_share_a_fold_in_any_order():
    texts = make_texts(50)
    folds = cache.assign_folds(texts + texts[::-1], 5)
    assert (folds[:50] == folds[50:][::-1]).all() and len(set(folds)) == 5
    assert cache.assign_folds(["", "a", "the red house", "Straße 7", "a"], 5).tolist() == [0, 2, 3, 4, 2]
    assert cache.assign_folds(["", "a", "the red house", "Straße 7"], 3).tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_the_noise_of_rounded_states_is_four_times_what_rounding_leaves(pooling):
    """Variance of the error of pooled states and prefix sums when states are rounded to bfloat16, by drawing them."""
    random = np.random.default_rng(0)
    shape = num_texts, num_tokens, d = 4000, 6, 4
    x = 2 ** random.uniform(0, 3, shape) * random.choice([-1, 1], shape)  # the logarithm of mantissas is uniform
    error = torch.from_numpy(x).bfloat16().double().numpy() - x
    pooled = error.mean(1) if pooling == "mean" else error[:, -1]
    prefix = error.cumsum(1)[:, :-1]
    tensors = {
        "layer.0.token_square": torch.from_numpy(np.square(x).sum(1).mean(0)),
        "layer.0.prefix_second_error": torch.zeros(d, 4),
        "layer.0.prefix_next_error": torch.zeros(d, 4),
    }
    file = type("File", (), {"get_tensor": lambda self, key: tensors[key]})()
    offsets = np.arange(num_texts + 1) * num_tokens
    metadata = describe_texts(np.arange(offsets[-1], dtype=np.int32), offsets)
    metadata["config"] = {"dtype": "bfloat16", "pooling": pooling}
    noise = load_rounding(file, metadata, 0, torch.device("cpu"))
    # of this x the mean of x^2 is 3 / (2 log 2) 4^e: an average over tokens counts large mantissas more, texts do not
    factor = 4 * 9 / (16 * np.log(2) ** 2)
    assert noise.pooled.sum().item() == pytest.approx(factor * np.square(pooled).mean(0).sum(), rel=0.05)
    assert noise.prefix.sum().item() == pytest.approx(factor * np.square(prefix).sum(1).mean(0).sum(), rel=0.05)


def test_texts_that_are_cut_are_counted_and_said(model_dirs, rows_path, tmp_path, capsys):
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path), "results_dir": tmp_path}
    config = configure(cache, **names, max_length=8)
    cache.main(config)
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["qwen2"])
    lengths = [len(tokenizer(text)["input_ids"]) for text in load_texts(config.data, config.run, "train").texts]
    num_cut = sum(length > 8 for length in lengths)
    assert 0 < num_cut < sum(length >= 8 for length in lengths)  # a text of exactly 8 tokens loses nothing
    assert f"{num_cut} of 168 texts cut at 8 tokens" in capsys.readouterr().out
    assert read_identity(cache.config_path(config))["num_texts_cut"] == num_cut


def test_pooled_states_are_those_of_the_library_row_by_row(model_dirs, rows_path, tmp_path):
    config = configure(
        cache, model_name=str(model_dirs["qwen2"]), dataset_name=str(rows_path), results_dir=tmp_path,
        save_pooled="all", tokens_per_batch=200,
    )  # fmt: skip
    cache.main(config)
    features, data = load_pooled_states(tmp_path, "train"), load_texts(config.data, config.run, "train")
    assert features["labels"].tolist() == data.labels.tolist()
    model = AutoModel.from_pretrained(model_dirs["qwen2"], dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["qwen2"])
    assert features["pooled"].shape == (3, 168, 32)
    for row in range(0, 168, 12):
        with torch.no_grad():
            states = model(**tokenizer(data.texts[row], return_tensors="pt"), output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):
            np.testing.assert_allclose(features["pooled"][layer, row], state[0].mean(0), rtol=1e-4, atol=1e-5)


def test_pooled_states_of_other_settings_are_made_again(model_dirs, rows_path, tmp_path):
    """Moments recomputed without pooled states leave the old states beside them: those must not be taken for theirs."""
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path), "results_dir": tmp_path}
    config = configure(cache, **names, save_pooled="last")
    cache.main(config)
    [path] = tmp_path.glob("moments/*/*/train.pooled.npy")
    mean = np.load(path)
    of_last = with_values(config, pooling="last")
    cache.main(with_values(of_last, save_pooled="none", overwrite=True))
    cache.main(of_last)
    last = np.load(path)
    assert np.abs(mean - last).max() > 0.1
    written = path.stat().st_mtime_ns
    cache.main(of_last)  # now they fit
    assert path.stat().st_mtime_ns == written


# ------------------------------------------------------------------ command line
def arguments(model_dir, rows, results_dir, *more):
    return ["cache.py", "--model_name", model_dir, "--dataset_name", rows, "--results_dir", results_dir, *more]


def moments_file(model_dir, results_dir):
    return results_dir / "moments" / model_dir.name / "rows" / "train.safetensors"


@pytest.mark.slow
def test_command_line_writes_reuses_and_refuses(model_dirs, rows_path, tmp_path, monkeypatch, capsys):
    call = arguments(model_dirs["qwen2"], rows_path, tmp_path)
    first = run_command(*call)  # once as a user types it
    assert first.returncode == 0, first.stderr
    path = moments_file(model_dirs["qwen2"], tmp_path)
    assert first.stdout.strip().splitlines()[-1] == str(path)
    written = path.stat().st_mtime_ns
    assert run_in_process(monkeypatch, *call) == 0
    assert "reused" in capsys.readouterr().out and path.stat().st_mtime_ns == written
    other = run_in_process(monkeypatch, *call, "--pooling", "last", "--max_length", "9")
    assert other.startswith("error: ") and "pooling: 'mean' there, 'last' now" in other and "max_length" in other
    assert path.stat().st_mtime_ns == written
    assert run_in_process(monkeypatch, *call, "--pooling", "last", "--overwrite") == 0
    assert path.stat().st_mtime_ns != written
    assert sorted(file.name for file in path.parent.iterdir()) == ["train.safetensors"]


def test_result_says_how_it_was_made(model_dirs, rows_path, tmp_path):
    names = {"model_name": str(model_dirs["llama"]), "dataset_name": str(rows_path), "results_dir": tmp_path}
    cache.main(configure(cache, **names, split="all"))
    [path] = tmp_path.glob("moments/*/*/all.safetensors")
    with open(path, "rb") as file:  # the header, read without the library
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = json.loads(header["__metadata__"]["json"])
    assert metadata["num_samples"] == 240 == sum(metadata["class_counts"])
    assert metadata["label_names"] == ["class 0", "class 1", "class 2"]
    assert metadata["environment"]["packages"]["torch"] == torch.__version__
    assert metadata["config"]["split"] == "all" and metadata["num_pairs"] == metadata["num_tokens"] - 240
    assert header["layer.0.prefix_second_moment"]["dtype"] == "F64" and len(metadata["model_fingerprint"]) == 16


def test_non_finite_states_name_layer_and_row(model_dirs, rows_path, tmp_path):
    model = AutoModel.from_pretrained(model_dirs["qwen2"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model_dirs["qwen2"])
    rare = tokenizer("quickly")["input_ids"][0]
    broken = tmp_path / "broken"
    tokenizer.save_pretrained(broken)
    with torch.no_grad():
        model.embed_tokens.weight[rare] = torch.inf
    model.save_pretrained(broken)
    config = configure(cache, model_name=str(broken), dataset_name=str(rows_path), results_dir=tmp_path)
    with pytest.raises(UserError, match=r"layer 0, row (\d+) of the split") as raised:
        cache.main(config)
    row = int(re.search(r"row (\d+)", str(raised.value))[1])
    text = load_texts(config.data, config.run, "train").texts[row]
    assert rare in tokenizer(text)["input_ids"]
    assert not list(tmp_path.glob("moments/**/*.safetensors"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--model_name", "tinny"], "Did you mean tiny?"),
        (["--model_name", "tests"], "config.json"),
        (["--device", "cuda:7"], "Try --device cpu"),
        (["--tokens_per_batch", "0"], "at least 1"),
        (["--dtype", "float8"], "float8"),
        (["--split", "dev"], "dev"),
        (["--text_column", "body"], "body"),
    ],
)
def test_mistakes_end_in_one_sentence(model_dirs, rows_path, tmp_path, monkeypatch, capsys, change, message):
    call = arguments(model_dirs["qwen2"], rows_path, tmp_path)
    for flag, value in zip(change[::2], change[1::2], strict=True):
        if flag in call:
            call[call.index(flag) + 1] = value
        else:
            call += [flag, value]
    code, printed = run_in_process(monkeypatch, *call), capsys.readouterr()
    assert code == 2 or code.startswith("error: "), code  # what no flag takes, or what cannot be done
    assert message in f"{code}{printed.err}{printed.out}"
    assert not list(tmp_path.glob("moments/**/*.safetensors"))


def test_a_pass_that_breaks_off_leaves_no_file(model_dirs, rows_path, tmp_path, monkeypatch):
    names = {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path), "results_dir": tmp_path}
    seen = []

    def interrupt(*_):
        seen.extend(tmp_path.rglob("*.partial.npy"))
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.LayerSums, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.main(configure(cache, **names, save_pooled="all"))
    assert len(seen) == 1  # the pooled states were being written
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
