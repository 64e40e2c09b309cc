"""List the models that the repository knows by name, settings of their architectures, and find their files."""

import functools
import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from utils.hub import Repository, nearest
from utils.script import ROOT, UserError


@dataclass(frozen=True)
class ModelSpec:
    """One row of the table of models that the repository knows by name."""

    path: str  # hub id, folder relative to the repository root, or .gguf file below `models_dir()`
    parameters: str
    command: str = ""  # command that makes or fetches a model that is neither in the repository nor on the hub


QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
LORA_TARGET_MODULES = {  # by `config.model_type`: the attention input projections
    **dict.fromkeys(("qwen2", "llama", "gemma3_text"), QUERY_KEY_VALUE),
    "openelm": ("qkv_proj",),
}
TOKENIZERS = {"openelm": "meta-llama/Llama-2-7b-hf"}  # by `config.model_type`, if not in the model's own repository
PAPER = {
    "Qwen/Qwen2-0.5B": "0.5B", "Qwen/Qwen2-1.5B": "1.5B", "Qwen/Qwen2-7B": "7B",
    "apple/OpenELM-270M": "270M", "apple/OpenELM-450M": "450M", "apple/OpenELM-1_1B": "1.1B", "apple/OpenELM-3B": "3B",
    "meta-llama/Meta-Llama-3-8B": "8B",
}  # fmt: skip
GEMMA = "python -m demo.real_llm gemma3-270m --accept_gemma_terms"
MODELS = {
    "tiny": ModelSpec("demo/tiny-lm", "1.4M"),
    "micro": ModelSpec("demo/micro-lm", "0.4M"),
    "small": ModelSpec("demo/runs/small", "3.7M", "python -m demo.pretrain --size small"),
    "medium": ModelSpec("demo/runs/medium", "12M", "python -m demo.pretrain --size medium"),
    "large": ModelSpec("demo/runs/large", "29M", "python -m demo.pretrain --size large"),
    "smollm2": ModelSpec("smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "135M", "python -m demo.real_llm smollm2"),
    "gemma3-270m": ModelSpec("gemma3-270m/gemma-3-270m-q4_k_m.gguf", "268M", GEMMA),
    **{name: ModelSpec(name, parameters) for name, parameters in PAPER.items()},
}

# Files of a folder that decide the states: weights, architecture, tokens, code.
DECIDING_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "*.txt", "*.py")
OTHER_FILES = {
    "pretraining.json", "generation_config.json", "training_args.bin", "metrics.json", "README.txt", "base_model.json",
}  # fmt: skip


def is_gguf(model_name: str) -> bool:
    """True for the path of a GGUF file."""
    return model_name.lower().endswith(".gguf")


def models_dir() -> Path:
    """The folder of the fetched models: $NTPS_MODELS_DIR, which several clones can share, or demo/runs."""
    return Path(os.environ.get("NTPS_MODELS_DIR") or ROOT / "demo" / "runs")


def model_source(model_name: str) -> str:
    """The hub id, local folder or GGUF file that `model_name` stands for. Raises UserError: no model is there."""
    spec = MODELS.get(model_name)
    if spec and (is_gguf(spec.path) or spec.path.startswith("demo/")):
        path = models_dir() / spec.path if is_gguf(spec.path) else ROOT / spec.path
        if not (path.is_file() or (path / "config.json").is_file()):
            raise UserError(f"No model at {path}. Run: {spec.command}")
        return str(path)
    if is_gguf(model_name):
        return model_name
    if Path(model_name).is_dir() and not (Path(model_name) / "config.json").is_file():
        raise UserError(f"No model in {model_name}: it holds no config.json. Give a folder made by save_pretrained.")
    if (model_name.startswith((".", "/", "~")) or model_name.count("/") > 1) and not Path(model_name).is_dir():
        raise UserError(f"The folder {model_name} does not exist.{nearest(model_name, MODELS)} Correct --model_name.")
    return spec.path if spec else model_name


def repository(name: str, revision: str | None = None) -> Repository:
    """The `Repository` of a model or tokenizer, for error messages about it."""
    known = (*MODELS, "gpt2", "distilgpt2")
    return Repository(name, "Model", known, "a local folder, or --model_name tiny", revision)


@functools.lru_cache(maxsize=256)
def file_digest(path: Path, size: int, modified: int) -> bytes:
    """SHA-256 of a file; its size and time of change are arguments so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def local_fingerprint(path: Path) -> str:
    """First 16 hex digits of the SHA-256 of a GGUF file, or over names and contents of a folder's deciding files."""
    files = [path] if path.is_file() else sorted({file for pattern in DECIDING_FILES for file in path.glob(pattern)})
    digests = {file: file_digest(file, file.stat().st_size, file.stat().st_mtime_ns) for file in files}
    if path.is_file():
        return digests[path].hex()[:16]
    deciding = [file.name.encode() + b"\0" + digests[file] for file in files if file.name not in OTHER_FILES]
    return hashlib.sha256(b"".join(deciding)).hexdigest()[:16]
