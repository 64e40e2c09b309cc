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

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from peft.utils import NoMatchingPeftModuleError
from transformers.pytorch_utils import Conv1D

import cache
import K_sweep
import linear_training
from utils.data.load import LabelledTexts, load_splits
from utils.models.adapters import save_base_model
from utils.models.identity import load_config, model_fingerprint
from utils.models.load import load_causal_lm
from utils.models.states import decoder_layers, decoder_of
from utils.models.table import FAMILIES, MODELS
from utils.parallel import processes
from utils.results import load_json, read_identity, replace_folder, result_path, save_json, settings_from_moments
from utils.script import UserError, run_script
from utils.settings import Run, Unrecorded, check_at_least_one, check_shares, flatten, result_settings, with_values
from utils.training.before_after import compare, print_comparison
from utils.training.finetune import FinetuningConfig, Hyperparameters, Trainable, finetune


@dataclass(frozen=True)
class Output(Unrecorded):
    """What is made besides."""

    ntps_after: bool = False  # then NTPS before and after, linear probe and gain, as one table


@dataclass(frozen=True, kw_only=True)
class Config(FinetuningConfig):
    """Edit the defaults here, or override any of them from the shell."""

    rank: int = 32  # r of LoRA
    alpha: float = 32.0  # B A is multiplied by alpha / r
    lora_dropout: float = 0.05  # on the input of A
    target_modules: tuple[str, ...] | None = None  # projections that get LoRA; None: query, key, value of the family
    start_layer: int = 0  # the first decoder layer that gets LoRA, counted from 0
    training: Hyperparameters = Hyperparameters(
        pooling="mean", dropout=0.05, num_steps=5000, batch_size=1, gradient_accumulation=1,
        learning_rate=1e-4, weight_decay=1e-5, warmup=0.05, steps_per_evaluation=500,
    )  # fmt: skip
    output: Output = Output()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least_one(self, "rank")
        check_shares(self, "lora_dropout")


# ------------------------------------------------------------------ the method
def add_adapter(model: torch.nn.Module, config: Config) -> PeftModel:
    """The causal LM with LoRA in its projections; nothing else requires a gradient.

    Raises:
        UserError: no targets are known, a target is not a projection inside the decoder, or there is no such layer.
    """
    model_config: Any = model.config
    decoder = decoder_of(model)
    family, num_layers = FAMILIES.get(decoder.config.model_type), len(decoder_layers(decoder))
    targets = config.target_modules or (family.lora_target_modules if family else None)
    projections = {  # GPT-2 keeps its matrices the other way round, in Conv1D
        name.rsplit(".", 1)[-1]: isinstance(module, Conv1D)
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    }
    present = ", ".join(sorted(projections))
    if not targets:
        raise UserError(
            f"Which projections of {config.model.model_name} ({model_config.model_type}) get LoRA? Name some with "
            f"--target_modules; it has {present}."
        )
    if missing := [target for target in targets if target not in projections]:
        raise UserError(
            f"{config.model.model_name} has no {', '.join(missing)}; --target_modules can name "
            f"{present}, the projections of its decoder."
        )
    if not 0 <= config.start_layer < num_layers:
        raise UserError(
            f"--start_layer {config.start_layer}: {config.model.model_name} has layers 0 to {num_layers - 1}."
        )
    spec = MODELS.get(config.model.model_name)
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        bias="none",
        target_modules=list(targets),
        layers_to_transform=list(range(config.start_layer, num_layers)) if config.start_layer else None,
        fan_in_fan_out=any(projections[target] for target in targets),
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        peft_model: Any = get_peft_model(model, lora)  # type: ignore[arg-type]
    except NoMatchingPeftModuleError as error:
        raise UserError(f"LoRA fits nothing in {config.model.model_name} ({error}). See --target_modules.") from None
    # PEFT writes down where the model was loaded from, for `tiny` a path of this machine
    peft_model.active_peft_config.base_model_name_or_path = spec.path if spec else config.model.model_name
    return peft_model


def build(config: FinetuningConfig, device: torch.device) -> Trainable:
    """The pretrained LM with an adapter; the decoder inside the PEFT model, so that no logits are computed."""
    assert isinstance(config, Config)
    peft_model = add_adapter(load_causal_lm(config.model, config.run, torch.device("cpu")), config)
    causal_lm: Any = peft_model.get_base_model()

    def save(folder: Path) -> None:
        with replace_folder(folder / "adapter") as temporary:
            # no look at the hub for a changed vocabulary: the embeddings are not trained
            peft_model.save_pretrained(str(temporary), save_embedding_layers=False)
            save_base_model(temporary, peft_model, config.model, config.run)

    return Trainable(decoder_of(causal_lm), save, config.model.dtype)


# ------------------------------------------------------------------ NTPS before and after
def scores_before_after(config: Config, data: dict[str, LabelledTexts]) -> tuple[dict, dict]:
    """The results of K_sweep.py without and with the adapter, all settings the same; made where they are not there.

    Raises:
        UserError: stored moments or scores of other settings, or of another model.
    """
    run = replace(config.run, overwrite=False)
    in_float32 = with_values(config.model, dtype="float32")  # unless moments are there in another dtype
    plain = cache.Config(pooling=config.training.pooling, model=in_float32, data=config.data, run=run)
    free = ("num_folds", "product_dtype", "dtype")
    found = flatten(settings_from_moments(plain, cache.config_path(plain)))
    plain = with_values(plain, **{name: found[name] for name in free})
    sweep = K_sweep.Config(model=plain.model, data=config.data, run=replace(run, device="cpu"))
    if K_sweep.output_path(sweep).is_file():
        result = load_json(K_sweep.output_path(sweep))
        stored, made = result["config"], result["moments"]["config"]
        plain = with_values(plain, **{name: made[name] for name in free})
        options = {name: stored[name] for name in ("num_null_draws", "seed")}
        sweep = with_values(replace(sweep, model=plain.model), **options, fractions=tuple(stored["fractions"]))
    adapter_dir = result_path("lora", config.run, config.model, config.data) / "adapter"
    adapted = with_values(plain, adapter_dir=adapter_dir)
    before = sweep_model(plain, sweep, data)
    return before, sweep_model(adapted, with_values(sweep, adapter_dir=adapter_dir), data)


def sweep_model(moments: cache.Config, sweep: K_sweep.Config, data: dict[str, LabelledTexts]) -> dict:
    """The result of K_sweep.py of one model; what is there of an earlier adapter at the same place is replaced.

    The moments of a finished result need not be there any more: in a study they are deleted once they are read.
    """
    fingerprint = model_fingerprint(moments.model, moments.run)
    path = K_sweep.output_path(sweep)
    if path.is_file() and not cache.config_path(moments).is_file():
        stored = load_json(path)
        identity = {"config": result_settings(moments), "model_fingerprint": fingerprint}
        rows = [stored["moments"]["fingerprint"], (stored["held_out"] or {}).get("fingerprint")]
        if (
            stored["config"] == result_settings(sweep)
            and {name: stored["moments"][name] for name in identity} == identity
            and rows == [data[split].fingerprint for split in ("train", "test")]
        ):
            return stored

    def renewing(path: Path, run: Run) -> Run:
        stored = read_identity(path) if path.is_file() else None
        found = stored and stored.get("moments", stored).get("model_fingerprint")
        return replace(run, overwrite=moments.model.adapter_dir is not None and found not in (None, fingerprint))

    for split in ("train", "test"):
        wanted = with_values(moments, split=split)
        cache.ensure(replace(wanted, run=renewing(cache.config_path(wanted), moments.run)), data[split])
    return processes().object_of_first(
        lambda: K_sweep.run(replace(sweep, run=renewing(K_sweep.output_path(sweep), sweep.run)))
    )


def probe_metrics(config: Config, dtype: str, data: dict[str, LabelledTexts]) -> dict:
    """The result of linear_training.py, with its defaults where it has to be made."""
    path = result_path("linear_training", config.run, config.model, config.data) / "metrics.json"
    if path.is_file():
        return load_json(path)
    probe = linear_training.Config(config.training.pooling, model=config.model, data=config.data)
    run = replace(config.run, overwrite=False)
    return linear_training.run(replace(with_values(probe, dtype=dtype), run=run), data)


def before_after(config: Config, metrics: dict, data: dict[str, LabelledTexts]) -> dict:
    """NTPS of the model before and after LoRA, linear probe, LoRA and gain.

    Raises:
        UserError: stored scores or a stored probe of other rows than those of `metrics`.
    """
    before, after = scores_before_after(config, data)
    probe = probe_metrics(config, before["moments"]["config"]["dtype"], data)
    rows = {"K_sweep.py": before["moments"]["fingerprint"], "linear_training.py": probe["train_fingerprint"]}
    for script, fingerprint in rows.items():
        if fingerprint != metrics["train_fingerprint"]:
            raise UserError(f"The result of {script} is of other rows than this run. Run it again with --overwrite.")
    default = result_settings(linear_training.Config(model=config.model, data=config.data))
    changed = {name: value for name, value in probe["config"].items() if value != default.get(name)}
    return compare(before, after, probe, metrics) | {"probe_settings": changed}


# ------------------------------------------------------------------ run
def main(config: Config) -> None:
    """Trains, or finds the finished run; then the table of NTPS before and after, if asked for."""
    load_config(config.model, config.run)  # its name is wrong or right before the data are read
    data = load_splits(config.data, config.run)
    metrics = finetune(config, "lora", build, data)
    if config.output.ntps_after:  # the passes of cache.py and the probe by all processes, K_sweep.py by the first
        result = before_after(config, metrics, data)
        path = result_path("lora", config.run, config.model, config.data) / "before_after.json"
        processes().object_of_first(lambda: save_json(path, result))
        print_comparison(result)
        print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
