"""Adapters in PEFT format: merged into the model they were made for with every one of their weights, or refused."""

import hashlib
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from utils.hub import shorten
from utils.models.states import decoder_of
from utils.models.table import local_fingerprint, model_source
from utils.results import load_json, save_json
from utils.script import UserError

BASE_MODEL_FILE = "base_model.json"  # lora_finetuning.py names in it the model that the adapter beside it is for
PREFIX = "base_model.model."  # of every key that PEFT saves


# ------------------------------------------------------------------ the model an adapter is for
def weights_digest(weights: dict[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over weights rounded to bfloat16: the same in any copy of a model."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode() + b"\0" + rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_base_model(folder: Path, peft_model: Any, model_name: str, fingerprint: str) -> None:
    """Writes beside an adapter which model it was made for, with a digest of the weights that it adapts."""
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
    if not named or named in (model_name, source):
        return True
    if Path(named).is_dir() and Path(source).exists():
        return local_fingerprint(Path(named)) == local_fingerprint(Path(source))
    if "/models--" in named:  # a folder of the hub's cache
        named = named.split("/models--", 1)[1].split("/", 1)[0].replace("--", "/")
    return Path(named).name.lower() == Path(source).name.lower()


# ------------------------------------------------------------------ merging
def find_target(causal_lm: Any, keys: list[str]) -> Any:
    """The part of the model that an adapter with these keys fits: the causal LM, or its model without the head."""
    for target in (causal_lm, causal_lm.base_model, decoder_of(causal_lm)):
        if all(hasattr(target, key.removeprefix(PREFIX).split(".")[0]) for key in keys if key.startswith(PREFIX)):
            return target
    return None


def merge_adapter(causal_lm: Any, folder: Path, model_name: str, fingerprint: str) -> Any:
    """The causal LM with the adapter in `folder` merged into it; `fingerprint` is that of the causal LM.

    Raises:
        UserError: no adapter is there, it is damaged, of another kind, of another model, or does not fit this one.
    """
    adapter, remedy = f"The adapter in {folder}", "Name the model it was made for with --model_name."
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"No adapter at {folder}. Make one: python lora_finetuning.py --model_name ...")
    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # a damaged file makes the libraries raise anything
        reason = f"{type(error).__name__}: {shorten(str(error))}"
        raise UserError(f"{adapter} cannot be read: {reason}. Train it anew.") from error
    if config.is_prompt_learning:
        kind = config.peft_type.value
        raise UserError(f"{adapter} is one of {kind}: it adds tokens and cannot be merged. --adapter_dir takes LoRA.")
    saved = getattr(config, "modules_to_save", None) or ()
    known = {name.split(".")[-1] for name, _ in causal_lm.named_modules()}
    heads = [name for name in saved if name.split(".")[-1] not in known]
    if left_out := [head for head in heads if any(f".{head}." in key for key in weights)]:
        print(
            f"The head of the adapter in {folder} is left out ({', '.join(left_out)}): no hidden state depends on it."
        )
        weights = {key: weight for key, weight in weights.items() if not any(f".{head}." in key for head in left_out)}
    if heads:
        config.modules_to_save = [name for name in saved if name not in heads] or None
    if (target := find_target(causal_lm, list(weights))) is None:
        kind = type(causal_lm).__name__
        raise UserError(f"{adapter} does not belong to {kind}: it has {min(weights)}, unknown to the model. {remedy}")
    [decoder_name] = [name for name, module in target.named_modules() if module is decoder_of(causal_lm)]
    if not any(key.startswith(f"{PREFIX}{decoder_name}") for key in weights):
        names = ", ".join(sorted({key.removeprefix(PREFIX).split(".")[0] for key in weights} or left_out))
        raise UserError(f"{adapter} changes {names} only, not a hidden state. Train one with other --target_modules.")
    named = config.base_model_name_or_path
    if not is_base_model(causal_lm, folder, named, model_name, fingerprint):
        raise UserError(
            f"{adapter} was made for {named}, or for other weights of that name, not for {model_name}. {remedy} If it "
            f"is the same one, change base_model_name_or_path in {folder}/adapter_config.json."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is looked at below
            peft_model: Any = PeftModel(target, config)
            result: Any = set_peft_model_state_dict(peft_model, weights)
            own = [name for name, _ in peft_model.named_parameters() if peft_model.base_model.prefix in name]
            merged = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:  # another width, a setting this version does not know
        raise UserError(f"{adapter} does not fit {model_name}: {shorten(str(error))}. {remedy}") from error
    faults = [f"has {key}, which is not used" for key in result.unexpected_keys]
    faults += [f"lacks {key}" for key in result.missing_keys if key in own]
    if faults:
        raise UserError(f"{adapter} does not fit {model_name}: it {faults[0]}.")
    return merged if target is causal_lm else causal_lm
