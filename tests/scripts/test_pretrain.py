"""demo/pretrain.py: a short run through the command line, and the committed checkpoints."""

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo import pretrain, random_twin
from tests.conftest import configure, flags, run_in_process
from utils.script import ROOT, UserError
from utils.settings import result_settings

pytestmark = pytest.mark.slow

CHECKPOINT = ROOT / "demo" / "tiny-lm"
SHORT: dict[str, Any] = {"max_documents": 300, "max_steps": 6, "batch_size": 4, "window": 64}
SHORT |= {"product_dtype": "float32"}  # faster on a CPU without bfloat16 instructions
FIELDS = {"fingerprint", "environment", "tokens_seen", "held_out_loss", "unigram_loss", "command", "config", "step"}


def report_of(folder):
    return json.loads((folder / "pretraining.json").read_text(encoding="utf-8"))


def short_config(folder, **changes):
    return configure(pretrain, **SHORT | {"output_dir": folder / "model"} | changes)


def test_a_short_run_writes_a_model_that_is_kept_refused_or_replaced(tmp_path, monkeypatch, capsys):
    options = flags(SHORT | {"output_dir": tmp_path / "model"})
    assert run_in_process(monkeypatch, "demo/pretrain.py", *options) == 0
    report = report_of(tmp_path / "model")
    assert set(report) >= FIELDS and report["step"] == 6 and report["tokens_seen"] == 6 * 4 * 64
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert len(tokenizer) <= model.config.vocab_size == 4096 and model.dtype == torch.bfloat16
    with pytest.raises(UserError, match=r"seed: 0 there, 7 now"):
        pretrain.main(short_config(tmp_path, seed=7))
    pretrain.main(short_config(tmp_path, device="cpu"))  # changes only speed: the finished model is kept
    assert "already complete" in capsys.readouterr().out
    pretrain.main(short_config(tmp_path, seed=7, max_steps=1, overwrite=True))
    report = report_of(tmp_path / "model")
    assert (report["config"]["seed"], report["step"]) == (7, 1)


@pytest.mark.parametrize(("name", "value", "remedy"), [("batch_size", 10**5, "Lower"), ("max_documents", 1, "Raise")])
def test_too_little_text_is_a_users_mistake(tmp_path, name, value, remedy):
    with pytest.raises(UserError, match=f"{remedy} --{name}"):
        pretrain.main(short_config(tmp_path, **{name: value}))


@pytest.mark.parametrize("script", [pretrain, random_twin])
def test_a_folder_of_other_files_is_never_replaced(script, tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"other files, which would be lost. Name a new folder with --output_dir"):
        script.main(configure(script, output_dir=tmp_path, overwrite=True))
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


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
