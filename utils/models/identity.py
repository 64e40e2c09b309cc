"""What a model is: its configuration, and the fingerprint that tells it from another one of the same name."""

import functools
import hashlib
from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

import utils.models.openelm  # noqa: F401, registers the `openelm` architecture with the Auto classes
from utils.hub import hub_errors
from utils.models import gguf
from utils.models.table import model_source, repository
from utils.script import UserError
from utils.settings import Model, Run


def read_config(model: Model, run: Run) -> PreTrainedConfig:
    """The configuration as the model has it, of all its parts.

    Raises:
        UserError: there is no such model, or it is an encoder-decoder.
    """
    if gguf.is_gguf(source := model_source(model.model_name)):
        return gguf.load_config(Path(source))
    with hub_errors(repository(model.model_name, model.revision)):
        config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=run.trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{model.model_name} ({config.model_type}) is an encoder-decoder; NTPS is of a causal LM, a decoder that "
            "reads the text alone. Choose another --model_name; docs/architectures.md lists what can be used."
        )
    return config


def load_config(model: Model, run: Run) -> PreTrainedConfig:
    """The configuration of the model, of a multi-modal one that of its text decoder.

    Raises:
        UserError: of `read_config`, or the text decoder cannot be told.
    """
    config = read_config(model, run)
    with hub_errors(repository(model.model_name, model.revision)):
        text_config = config.get_text_config(decoder=True)
    text_config._commit_hash = getattr(config, "_commit_hash", None)
    return text_config


# ------------------------------------------------------------------ fingerprints
# what of a folder decides the states: weights, architecture, tokens, code
DECIDING_FILES = ("*.safetensors", "*.bin", "*.gguf", "*.json", "*.model", "*.txt", "*.py")
# what it may hold besides, which decides nothing
OTHER_FILES = (
    "pretraining.json",
    "generation_config.json",
    "training_args.bin",
    "metrics.json",
    "README.txt",
    "base_model.json",
)


@functools.lru_cache(maxsize=256)
def file_digest(path: Path, size: int, modified: int) -> bytes:
    """SHA-256 of a file; its size and time of change are arguments so that a changed file is read again."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def local_fingerprint(place: Path) -> str:
    """First 16 hex digits of the SHA-256 over the names and contents of the files that decide a model's states.

    Args:
        place: folder, or a GGUF file, whose own name decides nothing.
    """
    digest = hashlib.sha256()
    if place.is_file():
        stat = place.stat()
        return file_digest(place, stat.st_size, stat.st_mtime_ns).hex()[:16]
    for path in sorted({path for pattern in DECIDING_FILES for path in place.glob(pattern)}):
        if path.name not in OTHER_FILES:
            stat = path.stat()
            digest.update(path.name.encode() + b"\0" + file_digest(path, stat.st_size, stat.st_mtime_ns))
    return digest.hexdigest()[:16]


def model_fingerprint(model: Model, run: Run) -> str:
    """What tells two models of the same name apart: of a local one a SHA-256, of the hub's its commit; of each part.

    The parts are the model, a tokenizer or an adapter from elsewhere, joined by `+`.
    """
    source = model_source(model.model_name)
    parts = [local_fingerprint(Path(source))] if Path(source).exists() else []
    if not parts:
        config = load_config(model, run)
        parts.append(getattr(config, "_commit_hash", None) or model.revision or "unknown")
    parts += [
        local_fingerprint(Path(place))
        for place in (model.tokenizer_name, model.adapter_dir)
        if place is not None and Path(place).exists()
    ]
    return "+".join(parts)


def known_fingerprint(model: Model, run: Run) -> str | None:
    """As `model_fingerprint`, None where the model is not on this machine: moments can be solved without it."""
    if model.adapter_dir is not None and not model.adapter_dir.is_dir():
        return None
    try:
        return model_fingerprint(model, run)
    except UserError:
        return None


def stored_as(model: Model) -> dict[str, str]:
    """`quantisation`, for what is kept about a result of a model in a GGUF file; nothing for any other."""
    if not gguf.is_gguf(source := model_source(model.model_name)):
        return {}
    return {"quantisation": f"{gguf.quantisation(Path(source))}, de-quantised once a run to {model.dtype}"}
