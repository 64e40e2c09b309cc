"""demo/pretrain.py: a short run through the command line, resuming, and the committed checkpoint."""

import json
import shutil
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import pretrain
from demo.pretrain import Config, learning_rate_at, split_documents
from tests.conftest import configure, run_in_process
from utils.data.docstrings import pretraining_corpus
from utils.script import ROOT, UserError
from utils.settings import result_settings

pytestmark = pytest.mark.slow

CHECKPOINT = ROOT / "demo" / "tiny-lm"
SHORT: dict[str, Any] = {"max_documents": 300, "max_steps": 6, "batch_size": 4, "window": 64}
SHORT |= {"product_dtype": "float32"}  # faster on a CPU without bfloat16 instructions
FIELDS = {"fingerprint", "environment", "tokens_seen", "held_out_loss", "unigram_loss", "command", "config", "step"}


def report_of(folder):
    return json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """The folder of a short uninterrupted run through the command line."""
    folder = tmp_path_factory.mktemp("pretrain")
    flags = [f"--{name}={value}" for name, value in SHORT.items()]
    with pytest.MonkeyPatch.context() as patch:
        assert run_in_process(patch, "demo/pretrain.py", *flags, f"--output_dir={folder / 'model'}") == 0
    return folder


def short_config(folder, **changes):
    return configure(pretrain, **SHORT | {"output_dir": folder / "model"} | changes)


def test_short_run_writes_a_model_that_loads(finished_run):
    folder = finished_run / "model"
    report = report_of(folder)
    assert set(report) >= FIELDS and report["step"] == 6 and report["tokens_seen"] == 6 * 4 * 64
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert len(tokenizer) <= model.config.vocab_size == 4096 and model.dtype == torch.bfloat16


def test_a_finished_model_is_kept_refused_or_replaced(finished_run, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(finished_run, tmp_path / "copy")
    with pytest.raises(UserError, match=r"seed: 0 there, 7 now"):
        pretrain.main(short_config(folder, seed=7))
    pretrain.main(short_config(folder, device="cpu"))  # changes only speed: the finished model is kept
    assert "already complete" in capsys.readouterr().out
    pretrain.main(short_config(folder, seed=7, max_steps=1, overwrite=True))
    report = report_of(folder / "model")
    assert (report["config"]["seed"], report["step"]) == (7, 1)
    monkeypatch.setattr(pretrain, "fingerprint", lambda: "0123456789abcdef")
    with pytest.raises(UserError, match=r"pretraining\.json was made from other rows"):
        pretrain.main(short_config(folder, seed=7, max_steps=1))


@pytest.mark.parametrize(("name", "value", "remedy"), [("batch_size", 10**5, "Lower"), ("max_documents", 1, "Raise")])
def test_too_little_text_is_a_users_mistake(tmp_path, name, value, remedy):
    with pytest.raises(UserError, match=f"{remedy} --{name}"):
        pretrain.main(short_config(tmp_path, **{name: value}))


def test_batches_cover_an_epoch_and_the_next_in_another_order():
    documents = [np.arange(1 + 100 * i, 41 + 100 * i, dtype=np.uint16) for i in range(5)]  # every token once
    config = Config(batch_size=2, window=8)
    steps, stream = pretrain.steps_per_epoch(documents, config), pretrain.batches(documents, config)
    taken = [next(stream) for _ in range(2 * steps)]
    inputs = torch.cat([batch[:, :-1].flatten() for batch in taken[:steps]])
    assert len(inputs.unique()) == len(inputs) == steps * 16 > 160
    again = torch.cat([batch[:, :-1].flatten() for batch in taken[steps:]])
    assert len(again.unique()) == len(inputs) and not torch.equal(again, inputs)


def test_learning_rate_rises_then_falls_to_zero():
    rates = [learning_rate_at(step, 100, 1.0, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[10] == 1.0 and rates[100] == pytest.approx(0.0)
    assert rates[:11] == sorted(rates[:11]) and rates[10:] == sorted(rates[10:], reverse=True)


# ------------------------------------------------------------------ the committed checkpoints
@pytest.mark.parametrize(("size", "num_bytes"), [("tiny", 4_000_000), ("micro", 1_000_000)])
def test_committed_checkpoint_is_small_and_says_how_it_was_made(size, num_bytes):
    folder = ROOT / "demo" / f"{size}-lm"
    assert sum(path.stat().st_size for path in folder.iterdir()) < num_bytes
    report, settings = report_of(folder), pretrain.complete_settings(configure(pretrain, size=size))
    assert set(report) >= FIELDS and report["config"] == result_settings(settings)
    assert report["held_out_loss"] < report["unigram_loss"] - 2


def test_committed_tokenizer_is_the_one_it_was_trained_with():
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "Return the µ-law of 12,345 values.\n\n    >>> mu(x)  # ünïcode 漢字\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text and len(tokenizer) == 4096
    stored = json.loads((CHECKPOINT / "tokenizer.json").read_text(encoding="utf-8"))
    loaded = json.loads(tokenizer.backend_tokenizer.to_str())
    for part in ("normalizer", "pre_tokenizer", "model"):  # AutoTokenizer rebuilds them by the model's type
        assert loaded[part] == stored[part]


def test_committed_checkpoint_predicts_held_out_docstrings():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    documents = [text for text in split_documents(pretraining_corpus())[1] if len(text) > 200][:60]
    losses = []
    for text in documents:  # one by one, every document from its first token
        input_ids = tokenizer(text, return_tensors="pt", truncation=True, max_length=256).input_ids
        with torch.no_grad():
            losses.append(cross_entropy(model(input_ids).logits[0, :-1], input_ids[0, 1:], reduction="none"))
    loss, report = torch.cat(losses).mean().item(), report_of(CHECKPOINT)
    assert loss < report["unigram_loss"] - 2
    assert loss == pytest.approx(report["held_out_loss"], abs=0.5)  # other documents cut elsewhere: the same magnitude
