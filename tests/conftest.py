"""Random two-layer models and made-up texts that every test can share; nothing is downloaded."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the libraries read it: no test may reach for a network
os.environ["TOKENIZERS_PARALLELISM"] = "false"
# One thread here and in every process the tests start: tiny models are fastest so, and a sum over two threads differs
# from a sum over one in the last bit, which matters if a killed run must equal an uninterrupted one.
os.environ["OMP_NUM_THREADS"] = "1"
# Real datasets are for the tests that ask for them, others have made-up rows in their place; the workers of
# pytest-xdist get this name.
if datasets_dir := os.environ.pop("NTPS_DATASETS_DIR", None):
    os.environ["NTPS_REAL_DATASETS_DIR"] = datasets_dir

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from utils.models.states import visit_hidden_states
from utils.models.table import file_digest
from utils.settings import with_values

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = Path(os.environ.get("NTPS_PUBLISHED", ""))
needs_published = pytest.mark.skipif("NTPS_PUBLISHED" not in os.environ, reason="NTPS_PUBLISHED names no folder")
WORDS = ["the", "of", "red", "green", "small", "large", "house", "river", "music", "engine", "stone", "quickly"]


def make_texts(num_texts: int, seed: int = 0, longest: int = 24) -> list[str]:
    """Ragged made-up sentences, some of one word."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, longest))) for _ in range(num_texts)]


def write_rows(path: Path, rows: list[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run_command(*arguments: str | Path, **options) -> subprocess.CompletedProcess:
    """A command line of the repository, as a user types it after `python`."""
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens without a pad token, as most causal LMs have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(make_texts(200), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", padding_side="left")


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory) -> dict[str, Path]:
    """Folders with a random model and its tokenizer, one per architecture."""
    tokenizer, folders = make_tokenizer(), {}
    size = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    size |= {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "eos_token_id": 0}
    for config in (
        Qwen2Config(**size, num_hidden_layers=2, tie_word_embeddings=True, pad_token_id=0),
        LlamaConfig(**size, num_hidden_layers=3, pad_token_id=None, bos_token_id=None),
    ):
        torch.manual_seed(0)
        folders[config.model_type] = folder = tmp_path_factory.mktemp("models") / f"random-{config.model_type}"
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folders


def retrain(folder: Path) -> None:
    """Changes weights of the model in a folder; size and time of the file stay, as after a copy with its times."""
    path = next(folder.glob("*.safetensors"))
    stat, tensors = path.stat(), load_file(path)
    name = next(name for name in sorted(tensors) if "embed" in name)
    tensors[name][:, 0] += 1  # of every token, so that the states of any text change
    save_file(tensors, path, metadata={"format": "pt"})
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    file_digest.cache_clear()  # a process of its own would read the file; this one remembers it by size and time


@pytest.fixture(scope="session")
def rows_path(tmp_path_factory) -> Path:
    """A labelled JSON lines file of 240 ragged texts in 3 classes, the class showing in a word."""
    texts = make_texts(240)
    rows = [{"text": f"{text} {WORDS[i % 3]}", "label": f"class {i % 3}"} for i, text in enumerate(texts)]
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)


@pytest.fixture(scope="session")
def names(model_dirs, rows_path) -> dict[str, Any]:
    """The settings that name the model and the rows of most tests."""
    return {"model_name": str(model_dirs["qwen2"]), "dataset_name": str(rows_path)}


def stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Moments by name, those of layers (`layer.<k>.<name>`) along a first axis in the order of layers."""
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith("layer.")}
    of_layers: dict[str, list[torch.Tensor]] = {}
    for key in sorted(tensors.keys() - found.keys(), key=lambda key: int(key.split(".")[1])):
        of_layers.setdefault(key.split(".", 2)[2], []).append(tensors[key])
    return found | {name: torch.stack(of_layer) for name, of_layer in of_layers.items()}


def load_moments(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file of moments, as `stacked` has them."""
    return stacked(load_file(path))


def only_result(folder: Path, pattern: str) -> tuple[Path, dict[str, Any]]:
    """The only JSON result of this name below a folder, and its content."""
    [path] = folder.glob(pattern)
    return path, json.loads(path.read_text())


def states_of(decoder, input_ids: torch.Tensor) -> list[torch.Tensor]:
    """A copy of the hidden states (b, t, d) of each layer, as the code under test visits them."""
    seen: dict[int, torch.Tensor] = {}
    visit_hidden_states(decoder, input_ids, lambda layer, states: seen.__setitem__(layer, states.clone()))
    assert sorted(seen) == list(range(len(seen)))
    return list(seen.values())


def configure(module: ModuleType, **values: Any) -> Any:
    """The config of a script with settings by name, in any group."""
    return with_values(module.Config(), **values)


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as the flags of a command line."""
    return [str(word) for name, value in settings.items() for word in (f"--{name}", value)]


def run_in_process(monkeypatch, script: str, *arguments: str | Path) -> int | str | None:
    """Runs a script through its command line without a new interpreter; gives the exit code or its message."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as exit:
        return exit.code
    return 0
