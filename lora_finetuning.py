"""LoRA fine-tuning of an LM with a linear head on its pooled last hidden state; and NTPS before and after it.

    python lora_finetuning.py                                        # embedded model and data, the paper's settings
    python lora_finetuning.py --ntps_after                           # also cache.py and K_sweep.py before and after
    python lora_finetuning.py --batch_size 16 --num_steps 1500
    python lora_finetuning.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion
    torchrun --nproc_per_node 4 lora_finetuning.py --batch_size 4 --gradient_accumulation 4

Reads the dataset and the model.
Writes results/lora/<model>/<dataset>/{metrics.json,history.csv,head.safetensors,adapter/}; `adapter/` is in PEFT
format, for PeftModel.from_pretrained or cache.py --adapter_dir. With --ntps_after also before_after.json, and the
moments and scores of <model> and of <model>+lora where cache.py and K_sweep.py put them.

A projection W (out, in) becomes W + (alpha / r) B A with A (r, in), B (out, r), B = 0 at the start. A, B and the head
are trained, in float32; everything else stays as it is.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import NoMatchingPeftModuleError

import cache
import K_sweep
import linear_training
from utils.checkpoints import replace_folder, result_folder
from utils.finetuning import FinetuningConfig, Trainable, finetune
from utils.io import (
    UserError,
    check_same_settings,
    load_json,
    model_path_name,
    path_name,
    result_settings,
    run_script,
    save_json,
)
from utils.models import FAMILIES, MODELS, load_causal_lm
from utils.moments import moments_path
from utils.report import SCORES


@dataclass(frozen=True, kw_only=True)
class Config(FinetuningConfig):
    """Edit the defaults here, or override any of them from the shell."""

    rank: int = 32  # r of LoRA
    alpha: float = 32.0  # B A is multiplied by alpha / r
    lora_dropout: float = 0.05  # on the input of A
    target_modules: tuple[str, ...] | None = None  # projections that get LoRA; None: query, key, value of the family
    start_layer: int = 0  # the first decoder layer that gets LoRA, counted from 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of frozen weights and products; what is trained is float32
    pooling: Literal["mean", "last"] = "mean"  # pooled state of a text: mean of its tokens, or its last token
    dropout: float = 0.05  # on the pooled state
    num_steps: int = 5000  # optimiser steps
    batch_size: int = 1  # texts of one forward pass; texts of like length come together
    gradient_accumulation: int = 1  # forward passes of one optimiser step, shared among the processes
    learning_rate: float = 1e-4  # peak, of Adafactor
    weight_decay: float = 1e-5  # of Adafactor
    warmup: float = 0.05  # share of the steps in which the learning rate rises; then half a cosine down to 0
    steps_per_evaluation: int = 500  # on the whole test split
    ntps_after: bool = False  # then NTPS before and after, linear probe and gain, as one table
    SPEED_OR_PLACE: ClassVar = (*FinetuningConfig.SPEED_OR_PLACE, "ntps_after")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ValueError(f"--rank must be at least 1, not {self.rank}")
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}")


# ------------------------------------------------------------------ the method
def add_adapter(model: torch.nn.Module, config: Config) -> PeftModel:
    """The causal LM with LoRA in its projections; nothing else requires a gradient.

    Raises:
        UserError: no targets are known, a target is not a module of the model, or there is no such layer.
    """
    model_config: Any = model.config
    family, num_layers = FAMILIES.get(model_config.model_type), model_config.num_hidden_layers
    targets = config.target_modules or (family.lora_target_modules if family else None)
    linear = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    present = ", ".join(sorted(linear - {"lm_head"}))
    if not targets:
        raise UserError(
            f"Which projections of {config.model_name} ({model_config.model_type}) get LoRA? Name some with "
            f"--target_modules; it has {present}."
        )
    if missing := [target for target in targets if target not in linear]:
        raise UserError(f"{config.model_name} has no {', '.join(missing)}; --target_modules can name {present}.")
    if not 0 <= config.start_layer < num_layers:
        raise UserError(f"--start_layer {config.start_layer}: {config.model_name} has layers 0 to {num_layers - 1}.")
    spec = MODELS.get(config.model_name)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        bias="none",
        target_modules=list(targets),
        layers_to_transform=list(range(config.start_layer, num_layers)) if config.start_layer else None,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        peft_model: Any = get_peft_model(model, lora)  # type: ignore[arg-type]
    except NoMatchingPeftModuleError as error:
        raise UserError(f"LoRA fits nothing in {config.model_name} ({error}). See --target_modules.") from None
    # PEFT writes down where the model was loaded from, for `tiny` a path of this machine
    peft_model.active_peft_config.base_model_name_or_path = spec.path if spec else config.model_name
    return peft_model


def build(config: FinetuningConfig, device: torch.device) -> Trainable:
    """The pretrained LM with an adapter; the decoder inside the PEFT model, so that no logits are computed."""
    assert isinstance(config, Config)
    peft_model = add_adapter(load_causal_lm(config, torch.device("cpu")), config)
    causal_lm: Any = peft_model.get_base_model()

    def save(folder: Path) -> None:
        with replace_folder(folder / "adapter") as temporary:
            # no look at the hub for a changed vocabulary: the embeddings are not trained
            peft_model.save_pretrained(str(temporary), save_embedding_layers=False)

    return Trainable(getattr(causal_lm, causal_lm.base_model_prefix), save, config.dtype)


# ------------------------------------------------------------------ NTPS before and after
def ntps_of(settings: cache.Config, sweep: K_sweep.Config) -> dict:
    """The scores of a model by cache.py, on both splits, and K_sweep.py; made where missing or older than the adapter.

    Args:
        settings: of cache.py; its `adapter_dir` says whether it is the model before or after LoRA.
        sweep: of K_sweep.py; the model's name is put in here.

    Raises:
        UserError: stored scores of other settings.
    """
    adapter, name = settings.adapter_dir, settings.model_name
    if adapter:
        name = model_path_name(settings.model_name, adapter)
    sweep = dataclasses.replace(sweep, model_name=name)
    newest = (adapter / "adapter_model.safetensors").stat().st_mtime if adapter else 0.0

    def is_current(path: Path) -> bool:
        return path.is_file() and path.stat().st_mtime >= newest

    path = K_sweep.result_path(sweep)
    if not is_current(path):
        for split in ("train", "test"):
            of_split = dataclasses.replace(settings, split=split)
            moments = moments_path(settings.results_dir, path_name(name), settings.dataset_name, split)
            cache.main(dataclasses.replace(of_split, overwrite=not is_current(moments)))
        K_sweep.main(dataclasses.replace(sweep, overwrite=True))
    result = load_json(path)
    check_same_settings(result["moments"]["config"], settings, path)
    return result


def probe_metrics(config: Config, dtype: str) -> dict:
    """The result of linear_training.py, with its defaults where it has to be made."""
    path = result_folder(config, "linear_training") / "metrics.json"
    if not path.is_file():
        shared = set(linear_training.fields_of(cache.Config)) & set(linear_training.fields_of(linear_training.Config))
        settings = {name: getattr(config, name) for name in shared} | {"dtype": dtype, "overwrite": False}
        linear_training.main(linear_training.Config(**settings))
    return load_json(path)


def scores_before_after(config: Config) -> tuple[dict, dict]:
    """The results of K_sweep.py without and with the adapter, all settings the same."""
    # in float32, which is cache.py's default, unless moments are there in another dtype
    in_float32 = dataclasses.replace(config, dtype="float32")
    settings = linear_training.cache_config(in_float32, "train", kept=("num_folds", "product_dtype", "dtype"))
    sweep = K_sweep.Config(dataset_name=config.dataset_name, results_dir=config.results_dir)
    before = ntps_of(settings, sweep)
    swept = {name: before["config"][name] for name in ("fractions", "num_null_draws", "seed")}
    sweep = dataclasses.replace(sweep, **{**swept, "fractions": tuple(swept["fractions"])})
    adapter_dir = result_folder(config, "lora") / "adapter"
    return before, ntps_of(dataclasses.replace(settings, adapter_dir=adapter_dir), sweep)


def before_after(config: Config, metrics: dict) -> dict:
    """NTPS of the model before and after LoRA, accuracy of the linear probe and of LoRA (R2 for regression), gain.

    Raises:
        UserError: stored scores or a stored probe of other rows than those of `metrics`.
    """
    before, after = scores_before_after(config)
    probe = probe_metrics(config, before["moments"]["config"]["dtype"])
    rows = {"K_sweep.py": before["moments"]["fingerprint"], "linear_training.py": probe["train_fingerprint"]}
    for script, fingerprint in rows.items():
        if fingerprint != metrics["train_fingerprint"]:
            raise UserError(f"The result of {script} is of other rows than this run. Run it again with --overwrite.")
    defaults = result_settings(linear_training.Config(model_name=config.model_name, dataset_name=config.dataset_name))
    score = "test_accuracy" if "test_accuracy" in metrics["last"] else "test_r2"
    linear, lora = probe["last"][score], metrics["last"][score]
    ntps = {
        name: {
            "before": before["score"][name],
            "after": after["score"][name],
            "difference": after["score"][name]["value"] - before["score"][name]["value"],
        }
        for name in SCORES
    }
    return {
        "config": metrics["config"],
        "probe_settings": {name: value for name, value in probe["config"].items() if value != defaults.get(name)},
        "rule": before["score"]["rule"],
        "ntps": ntps,
        "score": score,
        "linear_probe": linear,
        "lora": lora,
        "gain": lora - linear,
    }


def print_table(result: dict) -> None:
    """The table of `before_after`."""
    print(f"\n{'':<28}{'before':>10}{'after':>10}{'difference':>12}")
    for name, row in result["ntps"].items():
        print(f"{name:<28}{row['before']['value']:>10.4f}{row['after']['value']:>10.4f}{row['difference']:>+12.4f}")
    title = "linear probe, LoRA, gain"
    print(f"{title:<28}{result['linear_probe']:>10.4f}{result['lora']:>10.4f}{result['gain']:>+12.4f}")
    print(f"NTPS: {result['rule']}; probe and LoRA: {result['score']} at the last step")
    changed = ", ".join(f"{name} {value}" for name, value in result["probe_settings"].items())
    print(f"The probe was trained with {changed or 'the defaults'} (linear_training.py).")


# ------------------------------------------------------------------ run
def main(config: Config) -> None:
    """Trains, or finds the finished run; then the table of NTPS before and after, if asked for."""
    metrics = finetune(config, "lora", build)
    if config.ntps_after and metrics:
        result = before_after(config, metrics)
        path = result_folder(config, "lora") / "before_after.json"
        save_json(path, result)
        print_table(result)
        print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
