"""What a pass needs is said before it, close to what it takes; parts of it can be left away or put elsewhere."""

import os
import shutil

import numpy as np
import pytest
import torch
from transformers import DistilBertConfig, LlamaConfig, LlamaForCausalLM

import alignment_vis
import cache
import K_sweep
from tests.conftest import (
    WORDS,
    configure,
    load_moments,
    make_texts,
    make_tokenizer,
    run_command,
    run_in_process,
    write_rows,
)
from utils.algebra.memory import free_host_memory
from utils.script import UserError
from utils.settings import with_values


def settings(model_dirs, rows_path, folder, **more):
    names = {"model_name": str(model_dirs["llama"]), "dataset_name": str(rows_path), "results_dir": folder}
    return configure(cache, **names, **{"tokens_per_batch": 128} | more)


def moments(folder) -> dict[str, torch.Tensor]:
    [path] = [path for path in folder.rglob("train.safetensors") if "moments" in path.parts]
    return load_moments(path)


# ------------------------------------------------------------------ the estimate
# in each of them another part is most of the estimate; the last three are of a batch of 64 texts of 240 words
SHAPES = {
    "weights": (256, {"intermediate_size": 12000, "num_hidden_layers": 6}),
    "sums": (960, {"intermediate_size": 64, "num_hidden_layers": 4, "num_key_value_heads": 1}),
    "feed-forward": (128, {"intermediate_size": 1024, "num_hidden_layers": 2}),
    "attention": (384, {"intermediate_size": 64, "num_hidden_layers": 2}),
    "products": (384, {"intermediate_size": 64, "num_hidden_layers": 2, "num_key_value_heads": 1}),
}
# Every array of more than 64 KB goes back to the system as soon as it is not needed, as those above 32 MB always do:
# else the peak depends on how a heap of small arrays happens to break up.
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read as Linux gives it")
@pytest.mark.parametrize("shape", SHAPES)
def test_peak_memory_is_as_estimated(shape, tmp_path):
    """The peak of a process from before the model is loaded until the result is written, within a fifth."""
    tokenizer, (width, more) = make_tokenizer(), SHAPES[shape]
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=width, num_attention_heads=4, max_position_embeddings=512, **more
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    is_long, random = shape not in ("weights", "sums"), np.random.default_rng(0)
    texts = [" ".join(random.permutation(WORDS * 20)) for _ in range(64)] if is_long else make_texts(60)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": t, "label": f"class {i % 2}"} for i, t in enumerate(texts)])
    names = ["--model_name", tmp_path / "model", "--dataset_name", rows, "--results_dir", tmp_path / "results"]
    options = ["--split", "all", "--tokens_per_batch", 20000 if is_long else 256]
    options += ["--product_dtype", "float64" if shape == "products" else "float32"]
    done = run_command("-m", "tests.peak_memory", *names, *options, env=os.environ | GIVE_BACK)
    assert done.returncode == 0, done.stderr
    estimate, measured = map(int, done.stdout.split())
    assert abs(estimate / measured - 1) <= 0.2, f"{estimate:,} estimated, {measured:,} measured"


def test_what_cannot_fit_is_refused_before_the_model_is_loaded(model_dirs, rows_path, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.algebra.memory.free_host_memory", lambda: 10_000)
    monkeypatch.setattr(cache, "load_base_model", lambda *_: pytest.fail("the model is loaded"))
    with pytest.raises(UserError, match=r"cpu has 0 MB free .* --dtype bfloat16.*--layers.*--device_map auto"):
        cache.main(settings(model_dirs, rows_path, tmp_path))


VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
VERSION_2 = ("memory.max", "memory.current", "inactive_file")


@pytest.mark.parametrize(
    "membership, folder, names",
    [
        ("0::/job/step", "job/step", ("memory.max", "memory.current", "inactive_file")),
        ("0::/job/step", "job", ("memory.max", "memory.current", "inactive_file")),  # that of the job around it
        ("0::/", "", ("memory.max", "memory.current", "inactive_file")),  # a container that sees its own folder only
        (
            "3:cpu:/\n4:memory:/job\n0::/",
            "memory/job",
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ),
        ("4:memory:/not/mounted", "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")),
    ],
)
def test_the_limit_of_a_job_is_the_memory_there_is(membership, folder, names, tmp_path, monkeypatch):
    limit, use, of_files = names
    (tmp_path / "root" / folder).mkdir(parents=True)
    for name, content in ((limit, "5000000\n"), (use, "3000000\n"), ("memory.stat", f"anon 7\n{of_files} 1000000\n")):
        (tmp_path / "root" / folder / name).write_text(content)
    (tmp_path / "self").write_text(membership + "\n")
    monkeypatch.setattr("utils.algebra.memory.CGROUPS", tmp_path / "root")
    monkeypatch.setattr("utils.algebra.memory.OWN_CGROUPS", tmp_path / "self")
    assert free_host_memory() == 3_000_000
    (tmp_path / "root" / folder / limit).write_text("max\n")
    assert free_host_memory() > 3_000_000


def test_what_is_no_causal_lm_is_refused_before_it_is_measured(model_dirs, rows_path, tmp_path):
    folder = shutil.copytree(model_dirs["llama"], tmp_path / "distilbert")
    DistilBertConfig(vocab_size=300, dim=32, n_layers=2, n_heads=4, hidden_dim=48).save_pretrained(folder)
    with pytest.raises(UserError, match=r"distilbert. is not a causal LM"):
        cache.main(settings({"llama": folder}, rows_path, tmp_path))


def test_a_disk_that_is_too_small_is_refused(model_dirs, rows_path, tmp_path, monkeypatch):
    monkeypatch.setattr("utils.algebra.memory.free_disk", lambda path: 10_000)
    with pytest.raises(UserError, match=r"Free space, set --results_dir"):
        cache.main(settings(model_dirs, rows_path, tmp_path))


# ------------------------------------------------------------------ less, or elsewhere
def test_some_layers_are_those_of_all(model_dirs, rows_path, tmp_path):
    whole, some = (settings(model_dirs, rows_path, tmp_path / name, folds="all") for name in ("whole", "some"))
    cache.main(whole)
    cache.main(with_values(some, layers=(-1, 1)))
    expected, found = moments(tmp_path / "whole"), moments(tmp_path / "some")
    for name, value in expected.items():
        of_layers = name not in ("label_mean", "label_second_moment", "fold_num_samples") and "fold_label" not in name
        assert torch.equal(found[name], value[[1, 3]] if of_layers else value), name
    scores = [K_sweep.run(K_sweep.Config(model=c.model, data=c.data, run=c.run)) for c in (whole, some)]
    assert scores[0]["layers"][3] == scores[1]["layers"][1] and scores[0]["score"] == scores[1]["score"]
    with pytest.raises(UserError, match=r"has layers 1 3, which would be lost. Keep them with --layers 0 1 3, replace"):
        cache.main(with_values(some, layers=(0, 1)))
    cache.main(some)  # all layers are asked for: made again
    assert all(torch.equal(moments(tmp_path / "some")[name], value) for name, value in expected.items())


def test_who_needs_another_layer_says_how_to_have_it(model_dirs, rows_path, tmp_path):
    config = settings(model_dirs, rows_path, tmp_path, layers=(0, 1))
    cache.main(config)
    groups = {"model": config.model, "data": config.data, "run": config.run}
    with pytest.raises(UserError, match=r"hold layer 0, 1, not 3. Run cache.py with --layers 0 1 3"):
        K_sweep.run(K_sweep.Config(**groups))
    with pytest.raises(UserError, match=r"hold layer 0, 1, not 2"):
        alignment_vis.main(alignment_vis.Config(**groups, layer=2, words=("a=red,small", "b=green,large")))
    with pytest.raises(UserError, match=r"--layers 4: the model has layers 0 to 3"):
        cache.main(with_values(config, layers=(4,)))


@pytest.mark.parametrize("options", [{"accumulate_on": "cpu"}, {"device_map": "auto"}])
def test_another_place_changes_no_number(model_dirs, rows_path, tmp_path, options):
    plain, other = (settings(model_dirs, rows_path, tmp_path / n, product_dtype="float64") for n in ("plain", "other"))
    cache.main(plain)
    cache.main(with_values(other, **options))
    expected, found = moments(tmp_path / "plain"), moments(tmp_path / "other")
    for name, value in expected.items():
        scale = expected["prefix_second_moment"].abs().amax() if name.endswith("_error") else value.abs().amax()
        assert ((found[name] - value).abs() <= 1e-12 * scale).all(), name


def test_a_model_that_is_partly_on_disk_gives_the_same_numbers(model_dirs, rows_path, tmp_path, monkeypatch):
    plain, other = (settings(model_dirs, rows_path, tmp_path / n, product_dtype="float64") for n in ("plain", "other"))
    cache.main(plain)
    monkeypatch.setattr("transformers.integrations.accelerate.get_max_memory", lambda *_, **__: {"cpu": 90_000})
    load, places = cache.load_base_model, set()

    def loading(*arguments):
        model = load(*arguments)
        places.update(parameter.device.type for parameter in model.parameters())
        return model

    monkeypatch.setattr(cache, "load_base_model", loading)
    at_exit: list = []
    monkeypatch.setattr("atexit.register", lambda *call, **options: at_exit.append((call, options)))
    of_a_dead_process = tmp_path / "other" / f"offloaded.{2**22 + 1}.tmp"
    of_a_dead_process.mkdir(parents=True)
    cache.main(with_values(other, device_map="auto"))
    [folder] = (tmp_path / "other").glob("offloaded*")
    assert folder != of_a_dead_process
    for (function, *arguments), options in at_exit:
        function(*arguments, **options)
    assert not folder.exists()
    assert places == {"cpu", "meta"}  # what is on disk has no device
    expected, found = moments(tmp_path / "plain"), moments(tmp_path / "other")
    assert all(torch.allclose(found[name], value, rtol=1e-9, atol=1e-12) for name, value in expected.items())


def test_layers_and_pooled_states_exclude_each_other(rows_path, monkeypatch, capsys):
    call = ["--dataset_name", rows_path, "--layers", 1, "--save_pooled", "all"]
    assert run_in_process(monkeypatch, "cache.py", *call) == 2
    assert "--save_pooled keeps the last layer, or all of them" in " ".join(capsys.readouterr().err.split())
