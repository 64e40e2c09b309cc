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
from utils.models.identity import model_fingerprint
from utils.models.states import decoder_of
from utils.models.table import MODELS, model_source
from utils.results import load_json, save_json
from utils.script import UserError
from utils.settings import Model, Run

BASE_MODEL_FILE = "base_model.json"  # what lora_finetuning.py writes beside an adapter about the model it is for
PREFIX = "base_model.model."  # of every key that PEFT saves


# ------------------------------------------------------------------ the model an adapter is for
def weights_digest(weights: dict[str, Tensor]) -> str:
    """First 16 hex digits of the SHA-256 over weights rounded to bfloat16: the same in any copy of a model."""
    digest = hashlib.sha256()
    for name, weight in sorted(weights.items()):
        rounded = weight.detach().to("cpu", torch.bfloat16).contiguous()
        digest.update(name.encode() + b"\0" + rounded.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def save_base_model(folder: Path, peft_model: Any, model: Model, run: Run) -> None:
    """Writes beside an adapter which model it was made for, with a digest of the weights that it adapts."""
    ending = ".base_layer.weight"
    weights = {
        name.removesuffix(ending) + ".weight": weight
        for name, weight in peft_model.get_base_model().named_parameters()
        if name.endswith(ending)
    }
    about = {"model_name": model.model_name, "fingerprint": model_fingerprint(model, run)}
    save_json(
        folder / BASE_MODEL_FILE, {**about, "weights": sorted(weights), "weights_digest": weights_digest(weights)}
    )


def check_base_model(causal_lm: nn.Module, config: PeftConfig, model: Model, run: Run) -> None:
    """Compares the model with the one that the adapter was made for.

    Raises:
        UserError: it is another one.
    """
    assert model.adapter_dir is not None
    path = model.adapter_dir / BASE_MODEL_FILE
    if path.is_file():
        made_for = load_json(path)
        plain = Model(model.model_name, model.revision, model.tokenizer_name)
        if made_for["fingerprint"] == model_fingerprint(plain, run):
            return
        parameters = dict(causal_lm.named_parameters())
        adapted: dict[str, Tensor] = {name: parameters[name] for name in made_for["weights"] if name in parameters}
        if made_for["weights_digest"] == weights_digest(adapted):  # a copy elsewhere, or in other files
            return
        raise UserError(
            f"The adapter in {model.adapter_dir} was made for other weights than those of {model.model_name}: for "
            f"{made_for['model_name']} as it was then. Name that model with --model_name, or train the adapter anew."
        )
    name = config.base_model_name_or_path
    if not name or same_model(name, model, run):
        return
    raise UserError(
        f"The adapter in {model.adapter_dir} was made for {name}, not for {model.model_name}. Name that model with "
        f"--model_name; if it is the same one, change base_model_name_or_path in {model.adapter_dir}/"
        "adapter_config.json."
    )


def same_model(name: str, model: Model, run: Run) -> bool:
    """Whether a name in an adapter's settings is of this model: the same place, copy or last part of the name."""
    source = model_source(model.model_name)
    spec = MODELS.get(model.model_name)
    if name in (source, model.model_name) or (spec and name == spec.path):
        return True
    if Path(name).is_dir() and Path(source).exists():
        return model_fingerprint(Model(name), run) == model_fingerprint(Model(source), run)
    if "/models--" in name:  # a folder of the hub's cache
        name = name.split("/models--", 1)[1].split("/", 1)[0].replace("--", "/")
    return Path(name).name.lower() == Path(source).name.lower()


# ------------------------------------------------------------------ merging
def find_target(causal_lm: Any, keys: list[str], adapter_dir: Path) -> nn.Module:
    """The part of the model that an adapter with these keys fits: the causal LM, or its model without the head.

    Raises:
        UserError: a key is of no module, or no key is of the decoder.
    """
    first = ""
    for target in (causal_lm, causal_lm.base_model, decoder_of(causal_lm)):
        owners = {name for name, module in target.named_modules() if getattr(module, "weight", None) is not None}
        found = [owner_of(key.removeprefix(PREFIX), owners) for key in keys]
        if all(found):
            inside = {id(module) for module in decoder_of(causal_lm).modules()}
            modules = dict(target.named_modules())
            if not any(id(modules[name]) in inside for name in found):
                raise UserError(
                    f"The adapter in {adapter_dir} changes {found[0]} only, which gives no hidden states: it would "
                    "change nothing. Train one with other --target_modules."
                )
            return target
        first = first or next(key for key, name in zip(keys, found, strict=True) if not name)
    raise UserError(
        f"The adapter in {adapter_dir} does not belong to {type(causal_lm).__name__}: it has {first}, of which the "
        "model has nothing. Name the model it was made for with --model_name."
    )


def owner_of(key: str, owners: set[str]) -> str:
    """The longest part of a key, from its start, that names a module with weights; empty if there is none."""
    parts = key.split(".")
    return next((name for n in range(len(parts), 0, -1) if (name := ".".join(parts[:n])) in owners), "")


def leave_out_head(config: PeftConfig, weights: dict[str, Tensor], causal_lm: Any, folder: Path) -> dict[str, Tensor]:
    """The weights without those of a head that the causal LM has not, such as the `score` of a classifier.

    Raises:
        UserError: no weight is left.
    """
    known = {name.rpartition(".")[2] for name, _ in causal_lm.named_modules()}
    saved: Any = getattr(config, "modules_to_save", None) or ()
    heads = {name for name in saved if name.rpartition(".")[2] not in known}
    kept = {key: weight for key, weight in weights.items() if not any(f".{head}." in key for head in heads)}
    if not kept:
        raise UserError(f"The adapter in {folder} has no weights of the decoder: it would change no hidden state.")
    if len(kept) < len(weights):
        names = ", ".join(sorted(head for head in heads if any(f".{head}." in key for key in weights)))
        print(f"The head of the adapter in {folder} is left out ({names}): no hidden state depends on it.")
    if heads:
        config.modules_to_save = [name for name in saved if name not in heads] or None  # type: ignore[attr-defined]
    return kept


def merge_adapter(causal_lm: Any, model: Model, run: Run) -> Any:
    """The causal LM with the adapter of `model.adapter_dir` merged into it.

    Raises:
        UserError: no adapter is there, it is damaged, of another kind, of another model, or does not fit this one.
    """
    folder = model.adapter_dir
    assert folder is not None
    if not (folder / "adapter_config.json").is_file():
        raise UserError(f"No adapter at {folder}. Make one: python lora_finetuning.py --model_name ...")
    try:
        config = PeftConfig.from_pretrained(str(folder))
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # whatever a damaged file makes the libraries raise
        raise UserError(
            f"The adapter in {folder} cannot be read: {type(error).__name__}: {shorten(str(error))}. Train it anew."
        ) from error
    if config.is_prompt_learning:
        raise UserError(
            f"The adapter in {folder} is one of {config.peft_type.value}: it adds tokens and cannot be merged into "
            "weights. --adapter_dir takes LoRA."
        )
    weights = leave_out_head(config, weights, causal_lm, folder)
    target = find_target(causal_lm, list(weights), folder)
    check_base_model(causal_lm, config, model, run)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what they say is looked at below
            peft_model: Any = PeftModel(target, config)  # type: ignore[arg-type]
            result: Any = set_peft_model_state_dict(peft_model, weights)
            unused = list(result.unexpected_keys)
            wanted = [name for name, _ in peft_model.named_parameters() if peft_model.base_model.prefix in name]
            missing = [name for name in result.missing_keys if name in wanted]
            merged = peft_model.merge_and_unload(safe_merge=True)
    except Exception as error:  # another width, a setting this version does not know
        raise UserError(
            f"The adapter in {folder} does not fit {model.model_name}: {shorten(str(error))}. Name the model it was "
            "made for with --model_name."
        ) from error
    if unused or missing:
        fault = f"has {unused[0]}, which is not used" if unused else f"lacks {missing[0]}"
        raise UserError(f"The adapter in {folder} does not fit {model.model_name}: it {fault}.")
    return merged if target is causal_lm else causal_lm
