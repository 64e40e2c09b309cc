"""cache.py: the streamed moments equal the definition for any batches; and its command line."""

import json
import re

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

import cache
from tests.conftest import configure, make_texts, stacked
from tests.method.toy import averages_of, tensor
from utils.algebra.moments import describe_texts, load_rounding
from utils.data.load import LabelledTexts, load_texts
from utils.models.tokens import tokenize
from utils.script import UserError
from utils.settings import with_values


def dense_moments(model, token_ids: list[list[int]], y: np.ndarray, pooling: str) -> dict[str, torch.Tensor]:
    """The moments of each layer, text by text from the definition, with the matrices L1, L2 of the paper."""
    layers = []
    with torch.no_grad():
        of_texts = [model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states for ids in token_ids]
    for states in zip(*of_texts, strict=True):
        texts = [state[0].double().numpy() for state in states]  # (T, d) each
        pooled = np.stack([x[-1] if pooling == "last" else x.mean(0) for x in texts])
        prefixes = np.concatenate([np.tri(len(x) - 1, len(x)) @ x for x in texts])  # L1' x
        following = np.concatenate([np.eye(len(x))[1:] @ x for x in texts])  # L2' x
        square = tensor(sum(np.square(x).sum(0) for x in texts) / len(texts))
        layers.append(averages_of(pooled, y, prefixes, following) | {"token_square": square, "pooled": tensor(pooled)})
    of_labels = {name: layers[0].pop(name) for name in ("label_mean", "label_second_moment")}
    return {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]} | of_labels


@pytest.mark.parametrize(
    ("architecture", "pooling", "texts_per_batch"),
    [("qwen2", "mean", 1), ("qwen2", "last", 7), ("llama", "mean", 7), ("llama", "last", 3)],
)
def test_moments_equal_the_definition(model_dirs, architecture, pooling, texts_per_batch, monkeypatch):
    """Runs in float64, so that a difference is a mistake and not rounding; blocks end between batches."""
    monkeypatch.setattr(cache, "TOKENS_PER_BLOCK", 60)
    texts = [*make_texts(20, seed=3, longest=12), "a", "e", "the"]  # one-token texts among them
    model = AutoModel.from_pretrained(model_dirs[architecture], dtype=torch.float64).eval()
    tokens = tokenize(texts, AutoTokenizer.from_pretrained(model_dirs[architecture]), model.config)
    assert tokens.lengths.min() == 1 and tokens.lengths.max() > 10
    random, is_regression = np.random.default_rng(1), pooling == "last"
    labels = random.normal(size=23) if is_regression else random.integers(0, 3, 23)
    data = LabelledTexts(texts, labels, [] if is_regression else ["a", "b", "c"], "")
    folds, targets = cache.assign_folds(texts, 3), cache.one_hot_targets(data).numpy()
    options = {"num_folds": 3, "folds": "all", "product_dtype": "float64", "pooling": pooling}
    config = configure(cache, **options, tokens_per_batch=texts_per_batch * int(tokens.lengths.max()))
    pooled = np.zeros((model.config.num_hidden_layers + 1, 23, 32), np.float32)
    found = stacked(cache.accumulate(model, tokens, data, folds, config, pooled))
    token_ids = [part.tolist() for part in np.split(tokens.token_ids, tokens.offsets[1:-1])]
    dense = dense_moments(model, token_ids, targets, pooling)
    np.testing.assert_allclose(pooled, dense.pop("pooled"), atol=1e-6)
    for fold in range(3):
        inside = folds == fold
        texts_inside = [ids for ids, own in zip(token_ids, inside, strict=True) if own]
        expected = dense_moments(model, texts_inside, targets[inside], pooling)
        for name in cache.FOLD_MOMENTS:
            scale = float(expected[name].abs().max())
            torch.testing.assert_close(found[f"fold_{name}"][:, fold], expected[name], rtol=0, atol=1e-12 * scale)
        assert found["fold_num_samples"][fold] == inside.sum()
        for name in ("label_mean", "label_second_moment"):
            torch.testing.assert_close(found[f"fold_{name}"][fold], expected[name])
    for name, value in dense.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-12 * float(value.abs().max()), msg=name)


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
    square, zeros = torch.from_numpy(np.square(x).sum(1).mean(0)), torch.zeros(d, 4)
    get = {"get_tensor": lambda _, key: square if key == "layer.0.token_square" else zeros}
    offsets = np.arange(num_texts + 1) * num_tokens
    metadata = describe_texts(np.arange(offsets[-1], dtype=np.int32), offsets)
    metadata["config"] = {"dtype": "bfloat16", "pooling": pooling}
    noise = load_rounding(type("File", (), get)(), metadata, 0, torch.device("cpu"))
    # of this x the mean of x^2 is 3 / (2 log 2) 4^e: an average over tokens counts large mantissas more, texts do not
    factor = 4 * 9 / (16 * np.log(2) ** 2)
    of_pooled, of_prefix = (noise[f"{name}_rounding"].diagonal.sum().item() for name in ("pooled", "prefix"))
    assert of_pooled == pytest.approx(factor * np.square(pooled).mean(0).sum(), rel=0.05)
    assert of_prefix == pytest.approx(factor * np.square(prefix).sum(1).mean(0).sum(), rel=0.05)


def test_pooled_states_of_other_settings_are_made_again(names, tmp_path):
    """Moments recomputed without pooled states leave the old states beside them: those must not be taken for theirs."""
    config = configure(cache, **names, results_dir=tmp_path, save_pooled="last")
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


def test_result_says_how_it_was_made(names, tmp_path, capsys):
    config = configure(cache, **names, results_dir=tmp_path, split="all", max_length=8)
    cache.main(config)
    with open(cache.config_path(config), "rb") as file:  # the header, read without the library
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = json.loads(header["__metadata__"]["json"])
    assert metadata["num_samples"] == 240 == sum(metadata["class_counts"])
    assert metadata["label_names"] == ["class 0", "class 1", "class 2"]
    assert metadata["config"]["split"] == "all" and metadata["num_pairs"] == metadata["num_tokens"] - 240
    assert header["layer.0.prefix_second_moment"]["dtype"] == "F64" and len(metadata["model_fingerprint"]) == 16
    assert f"{metadata['num_texts_cut']} of 240 texts cut at 8 tokens" in capsys.readouterr().out


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


def test_a_pass_that_breaks_off_leaves_no_file(names, tmp_path, monkeypatch):
    seen = []

    def interrupt(*_, **__):
        seen.extend(tmp_path.rglob("*.partial.npy"))
        raise KeyboardInterrupt

    monkeypatch.setattr(cache.LayerSums, "add", interrupt)
    with pytest.raises(KeyboardInterrupt):
        cache.main(configure(cache, **names, results_dir=tmp_path, save_pooled="all"))
    assert len(seen) == 1  # the pooled states were being written
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
