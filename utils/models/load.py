"""Load a causal LM, its configuration and tokenizer; and compute the fingerprint that identifies its weights.

Functions import the modelling code that they use: it loads as slowly as torch, and `--help` does not need it.
"""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from utils.hub import hub_errors
from utils.models.states import decoder_of
from utils.models.table import TOKENIZERS, is_gguf, local_fingerprint, model_source, repository
from utils.script import UserError
from utils.settings import Model, Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer

TABLE = "Choose another --model_name; docs/architectures.md lists architectures that work."


def read_config(model: Model, run: Run) -> "PreTrainedConfig":
    """The configuration of all parts of the model. Raises UserError: no such model, or an encoder-decoder."""
    from transformers import AutoConfig

    import utils.models.openelm  # noqa: F401, registers the `openelm` architecture with the Auto classes

    if Path(source := model_source(model.model_name)).exists() and model.revision is not None:
        raise UserError(f"--revision {model.revision} needs the hub; {source} is local. Leave it out.")
    if is_gguf(source):
        from utils.models import gguf

        return gguf.load_config(Path(source))
    with hub_errors(repository(model.model_name, model.revision)):
        config = AutoConfig.from_pretrained(source, revision=model.revision, trust_remote_code=run.trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{model.model_name} ({config.model_type}) is an encoder-decoder, not a causal LM. {TABLE}")
    return config


def load_config(model: Model, run: Run) -> "PreTrainedConfig":
    """The configuration of the text decoder. Raises UserError as `read_config`."""
    config = read_config(model, run)
    with hub_errors(repository(model.model_name, model.revision)):
        text_config = config.get_text_config(decoder=True)
    text_config._commit_hash = getattr(config, "_commit_hash", None)
    return text_config


def model_fingerprint(model: Model, run: Run) -> str:
    """SHA-256 or hub commit of a model, `+` that of its own tokenizer or adapter. Raises UserError: no such model."""
    if model.adapter_dir is not None and not model.adapter_dir.is_dir():
        raise UserError(f"No adapter can be read from {model.adapter_dir}: it is no folder. Correct --adapter_dir.")
    source = model_source(model.model_name)
    if Path(source).exists():
        parts = [local_fingerprint(Path(source))]
    else:
        parts = [getattr(load_config(model, run), "_commit_hash", None) or model.revision or "unknown"]
    others = [Path(other) for other in (model.tokenizer_name, model.adapter_dir) if other is not None]
    return "+".join([*parts, *(local_fingerprint(other) for other in others if other.exists())])


def stored_as(model: Model) -> dict[str, str]:
    """`{"quantisation": ...}` of a model in a GGUF file, for the metadata of its results; `{}` for other models."""
    if not is_gguf(source := model_source(model.model_name)):
        return {}
    from utils.models import gguf

    return {"quantisation": f"{gguf.quantisation(Path(source))}, de-quantised once a run to {model.dtype}"}


def load_tokenizer(model: Model, run: Run, config: "PreTrainedConfig") -> "Tokenizer":
    """The tokenizer, set to pad and cut texts at their end even if its own settings differ. Raises UserError."""
    from transformers import AutoTokenizer

    name, revision = model_source(model.model_name), model.revision
    if model.tokenizer_name:
        name, revision = model.tokenizer_name, None
    elif config.model_type in TOKENIZERS and not Path(name, "tokenizer_config.json").is_file():
        name, revision = TOKENIZERS[config.model_type], None
    if name.startswith((".", "/", "~")) and not Path(name).exists():
        raise UserError(f"The folder or file {name} does not exist. Correct --tokenizer_name.")
    if is_gguf(name):
        from utils.models import gguf

        return gguf.load_tokenizer(Path(name))
    options = {"revision": revision, "trust_remote_code": run.trust_remote_code}
    sought = repository(name, revision)
    with hub_errors(dataclasses.replace(sought, kind="Tokenizer of", instead="--tokenizer_name for an open copy")):
        return AutoTokenizer.from_pretrained(name, padding_side="right", truncation_side="right", **options)


def auto_class_of(model: Model, config: "PreTrainedConfig") -> Any:
    """The Auto class of the causal LM; of a multi-modal model, that of all parts. Raises UserError: it has none."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    for auto_class in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto_class._model_mapping:  # type: ignore[attr-defined]
            return auto_class
    if "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        return AutoModelForCausalLM
    raise UserError(f"{model.model_name} ({config.model_type}) is not a causal LM that transformers knows. {TABLE}")


def load_weights(model: Model, run: Run, device_map: str | None = None) -> "PreTrainedModel":
    """The causal LM on the CPU, or spread by a device map. Raises UserError: it fails to load, or lacks a weight."""
    if is_gguf(source := model_source(model.model_name)):
        from utils.models import gguf

        if device_map:
            raise UserError(f"{model.model_name} is a GGUF file, which --device_map cannot spread. Leave it out.")
        return gguf.load_model(Path(source), getattr(torch, model.dtype))
    auto_class = auto_class_of(model, read_config(model, run))
    options = {"revision": model.revision, "trust_remote_code": run.trust_remote_code, "device_map": device_map}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
    with hub_errors(repository(model.model_name, model.revision)):
        loaded, info = auto_class.from_pretrained(source, dtype=getattr(torch, model.dtype), **options)
    for name, stored, wanted in sorted(info["mismatched_keys"], key=str):  # a set has no fixed order
        sizes = f"{tuple(stored)} in its files and {tuple(wanted)} by its config.json"
        raise UserError(f"{model.model_name}: {name} is {sizes}. Download the model again.")
    decoder = decoder_of(loaded)
    [prefix] = [name for name, module in loaded.named_modules() if module is decoder]
    if missing := sorted(name for name in info["missing_keys"] if name.startswith(f"{prefix}.")):
        raise UserError(f"{model.model_name} lacks {len(missing)} weights, such as {missing[0]}. Download it again.")
    return loaded


def load_causal_lm(model: Model, run: Run) -> "PreTrainedModel":
    """The causal LM on the CPU, in evaluation mode, with its adapter, if any, merged. Raises UserError."""
    causal_lm: Any = load_weights(model, run)
    if model.adapter_dir is not None:
        from utils.models.adapters import merge_adapter

        base = dataclasses.replace(model, adapter_dir=None)
        causal_lm = merge_adapter(causal_lm, model.adapter_dir, base.model_name, model_fingerprint(base, run))
    return causal_lm.eval()


def load_base_model(model: Model, run: Run, device: torch.device, device_map: str = "none") -> "PreTrainedModel":
    """The decoder without its lm_head, in evaluation mode; `device_map` "auto" spreads its layers. Raises UserError."""
    if device_map == "none":
        return decoder_of(load_causal_lm(model, run)).to(device).eval()
    if model.adapter_dir is not None:
        raise UserError("--device_map auto takes no --adapter_dir: an adapter merges on one device. Leave out one.")
    return decoder_of(load_weights(model, run, device_map)).eval()
