"""Merge an adapter in PEFT format, with all its weights, into its own base model; refuse any other model."""

import warnings
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from utils.hub import shorten
from utils.models.states import decoder_of
from utils.models.table import local_fingerprint, model_source
from utils.results import read_stored
from utils.script import UserError

BASE_MODEL_FILE = "base_model.json"  # lora_finetuning.py writes in it the fingerprint of the adapter's model


def read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and weights of an adapter. Raises UserError: it is missing or damaged."""
    from peft import PeftConfig
    from peft.utils.save_and_load import load_peft_weights

    path = str(folder.resolve())  # PEFT may take a relative path for the name of a repository on the hub
    try:
        return PeftConfig.from_pretrained(path), load_peft_weights(path, device="cpu")
    except Exception as error:  # a missing or damaged file makes the libraries raise anything
        found = f"No adapter can be read from {folder} ({type(error).__name__}: {shorten(str(error))})"
        raise UserError(f"{found}. Make one: python lora_finetuning.py --model_name ...") from error


def is_base_model(folder: Path, named: str | None, model_name: str, fingerprint: str) -> bool:
    """True if this model is the adapter's base: by fingerprint or, for an adapter of another program, by name."""
    if (folder / BASE_MODEL_FILE).is_file():
        return read_stored(folder / BASE_MODEL_FILE)["fingerprint"] == fingerprint
    source = model_source(model_name)
    if named and Path(named).is_dir() and Path(source).exists():
        return local_fingerprint(Path(named)) == local_fingerprint(Path(source))
    return not named or named == model_name or Path(named).name.lower() == Path(source).name.lower()


def without_head(causal_lm: nn.Module, config: Any, weights: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """The weights without those of a classifier's head, which no causal LM has; also removes the head from `config`."""
    known = {name.split(".")[-1] for name, _ in causal_lm.named_modules()}
    saved = getattr(config, "modules_to_save", None) or ()
    heads = [name for name in saved if name.split(".")[-1] not in known]
    config.modules_to_save = [name for name in saved if name not in heads] or None
    kept = {key: weight for key, weight in weights.items() if not any(f".{head}." in key for head in heads)}
    if len(kept) < len(weights):
        print(f"The head of the adapter in {folder} is left out ({', '.join(heads)}): no hidden state depends on it.")
    return kept


def adapted_module(causal_lm: Any, keys: list[str]) -> nn.Module | None:
    """The trained module: the causal LM, its base model or its decoder; None if no key is in the decoder."""
    decoder = decoder_of(causal_lm)
    for module in (causal_lm, causal_lm.base_model, decoder):
        [prefix] = [name for name, part in module.named_modules() if part is decoder]
        is_whole = all(hasattr(module, key.split(".")[0]) for key in keys)
        if is_whole and any(key.startswith(prefix) for key in keys):
            return module
    return None


def merge_adapter(causal_lm: Any, folder: Path, model_name: str, fingerprint: str) -> Any:
    """The causal LM, of this `fingerprint`, with the adapter in `folder` merged into it. Raises UserError."""
    from peft import PeftModel
    from peft.utils.save_and_load import set_peft_model_state_dict

    config, weights = read_adapter(folder)
    remedy = "Name the model it was made for with --model_name."
    if not is_base_model(folder, named := config.base_model_name_or_path, model_name, fingerprint):
        found = f"The adapter in {folder} was made for {named}, or other weights of that name, not for {model_name}"
        change = f"change base_model_name_or_path in {folder}/adapter_config.json and delete {BASE_MODEL_FILE} there"
        raise UserError(f"{found}. {remedy} If the model is the same, {change}.")
    misfit = f"The adapter in {folder} does not fit {model_name}"
    weights = without_head(causal_lm, config, weights, folder)
    keys = [key.removeprefix("base_model.model.") for key in weights]  # as PEFT saves all of them
    target: Any = adapted_module(causal_lm, keys)
    if target is None:
        parts = ", ".join(sorted({key.split(".")[0] for key in keys})) or "its head"
        raise UserError(f"{misfit}: it changes {parts}, not the decoder of this model. {remedy}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the code below checks the keys that they name
            peft_model: Any = PeftModel(target, config)
            result: Any = set_peft_model_state_dict(peft_model, weights)
            own = {name for name, _ in peft_model.named_parameters() if peft_model.base_model.prefix in name}
            merged = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:  # another width, a setting this version does not know
        raise UserError(f"{misfit}: {shorten(str(error)) or type(error).__name__}. {remedy}") from error
    faults = [f"has {key}, which is not used" for key in result.unexpected_keys]
    faults += [f"lacks {key}" for key in result.missing_keys if key in own]
    if faults:
        raise UserError(f"{misfit}: it {faults[0]}. {remedy}")
    return merged if target is causal_lm else causal_lm
