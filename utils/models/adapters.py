"""Merge an adapter in PEFT format, with all its weights, into the model that it was made for; refuse any other."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.hub import shorten
from utils.models.states import decoder_of
from utils.models.table import local_fingerprint, model_source
from utils.results import load_json, save_json
from utils.script import UserError

BASE_MODEL_FILE = "base_model.json"  # lora_finetuning.py names in it the model that the adapter beside it is for


# ------------------------------------------------------------------ the model an adapter is for
def weights_digest(weights: dict[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over weights rounded to bfloat16; equal for all copies of a model."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode() + b"\0" + rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_base_model(folder: Path, peft_model: Any, model_name: str, fingerprint: str) -> None:
    """Writes, beside an adapter, the name of its model and a digest of the weights that it adapts."""
    ending = ".base_layer.weight"
    parameters = peft_model.get_base_model().named_parameters()
    weights = {name.replace(ending, ".weight"): weight for name, weight in parameters if name.endswith(ending)}
    about = {"model_name": model_name, "fingerprint": fingerprint, "weights": sorted(weights)}
    save_json(folder / BASE_MODEL_FILE, about | {"weights_digest": weights_digest(weights)})


def is_base_model(causal_lm: nn.Module, folder: Path, named: str | None, model_name: str, fingerprint: str) -> bool:
    """True if the adapter was made for this model: by fingerprint, digest or, for a foreign adapter, by name."""
    if (folder / BASE_MODEL_FILE).is_file():
        made_for, parameters = load_json(folder / BASE_MODEL_FILE), dict(causal_lm.named_parameters())
        adapted: dict[str, Tensor] = {name: parameters[name] for name in made_for["weights"] if name in parameters}
        return fingerprint == made_for["fingerprint"] or weights_digest(adapted) == made_for["weights_digest"]
    source = model_source(model_name)
    if named and Path(named).is_dir() and Path(source).exists():
        return local_fingerprint(Path(named)) == local_fingerprint(Path(source))
    return not named or named == model_name or Path(named).name.lower() == Path(source).name.lower()


# ------------------------------------------------------------------ merging
def merge_adapter(causal_lm: Any, folder: Path, model_name: str, fingerprint: str) -> Any:
    """The causal LM with the adapter in `folder` merged into it; `fingerprint` is that of the causal LM.

    Raises:
        UserError: the adapter is missing, damaged, of another kind, made for another model, or does not fit.
    """
    from peft import PeftConfig, PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    adapter, remedy = f"The adapter in {folder}", "Name the model it was made for with --model_name."
    if not (folder / "adapter_config.json").is_file() or not list(folder.glob("adapter_model.*")):
        needed = "adapter_config.json and adapter_model.safetensors"
        raise UserError(
            f"No adapter at {folder}: it needs {needed}. Make one: python lora_finetuning.py --model_name ..."
        )
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # a damaged file makes the libraries raise anything
        reason = f"{type(error).__name__}: {shorten(str(error))}"
        raise UserError(f"{adapter} cannot be read: {reason}. Train it anew.") from error
    if config.is_prompt_learning:
        kind = config.peft_type.value
        raise UserError(f"{adapter} uses {kind}: it adds tokens and cannot be merged. Give a LoRA adapter.")
    if not is_base_model(causal_lm, folder, named := config.base_model_name_or_path, model_name, fingerprint):
        raise UserError(
            f"{adapter} was made for {named}, or for other weights of that name, not for {model_name}. {remedy} If the "
            f"model is the same, change base_model_name_or_path in {folder}/adapter_config.json."
        )
    weights = without_head(causal_lm, config, weights, folder)
    keys = [key.removeprefix("base_model.model.") for key in weights]  # as PEFT saves all of them
    parts = {key.split(".")[0] for key in keys}
    # the module that was trained: the causal LM, or its model without the head
    modules = (causal_lm, causal_lm.base_model, decoder := decoder_of(causal_lm))
    target = next((module for module in modules if all(hasattr(module, part) for part in parts)), None)
    if target is None:
        unknown = ", ".join(sorted(parts))
        raise UserError(f"{adapter} does not fit {model_name}: it changes {unknown} of another architecture. {remedy}")
    [decoder_name] = [name for name, module in target.named_modules() if module is decoder]
    if not any(key.startswith(decoder_name) for key in keys):
        names = ", ".join(sorted(parts)) or "its head"
        raise UserError(f"{adapter} changes {names} only, not a hidden state. Train one with other --target_modules.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the keys they name are checked below
            peft_model: Any = PeftModel(target, config)
            result: Any = set_peft_model_state_dict(peft_model, weights)
            own = {name for name, _ in peft_model.named_parameters() if peft_model.base_model.prefix in name}
            merged = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:  # another width, a setting this version does not know
        reason = shorten(str(error)) or type(error).__name__
        raise UserError(f"{adapter} does not fit {model_name}: {reason}. {remedy}") from error
    faults = [f"has {key}, which is not used" for key in result.unexpected_keys]
    faults += [f"lacks {key}" for key in result.missing_keys if key in own]
    if faults:
        raise UserError(f"{adapter} does not fit {model_name}: it {faults[0]}. {remedy}")
    return merged if target is causal_lm else causal_lm


def without_head(causal_lm: nn.Module, config: Any, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights without those of a classifier's head, which no causal LM has; also removes the head from `config`."""
    known = {name.split(".")[-1] for name, _ in causal_lm.named_modules()}
    saved = getattr(config, "modules_to_save", None) or ()
    heads = [name for name in saved if name.split(".")[-1] not in known]
    config.modules_to_save = [name for name in saved if name not in heads] or None
    dropped = {head for head in heads for key in weights if f".{head}." in key}
    if dropped:
        print(f"The head of the adapter in {folder} is left out ({', '.join(dropped)}): no hidden state depends on it.")
    return {key: weight for key, weight in weights.items() if not any(f".{head}." in key for head in dropped)}
