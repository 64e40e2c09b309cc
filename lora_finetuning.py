"""Fine-tune an LM by LoRA with a linear head on its pooled last hidden state, and compute NTPS before and after.

    python lora_finetuning.py                                        # embedded model and data, the paper's settings
    python lora_finetuning.py --ntps_after                           # also NTPS before and after
    python lora_finetuning.py --batch_size 16 --num_steps 1500
    python lora_finetuning.py --model_name Qwen/Qwen2-0.5B --dataset_name emotion
    torchrun --nproc_per_node 4 lora_finetuning.py --batch_size 4 --gradient_accumulation 4

Reads the dataset and the model.
Writes results/lora/<model>/<dataset>/{metrics.json,history.csv,head.safetensors,adapter/}; `adapter/` is in PEFT
format, for PeftModel.from_pretrained or cache.py --adapter_dir. With --ntps_after also before_after.json, and the
moments and scores of <model> and of <model>+lora, at the paths that cache.py and K_sweep.py use.

A projection W (out, in) becomes W + (alpha / r) B A with A (r, in), B (out, r), B = 0 at the start. The script
trains A, B and the head, and freezes all other weights.

Differs from the paper: A, B and the head are in float32, not bfloat16; with --batch_size above 1, which the paper does
not use, the texts of a batch are of similar length.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import cache
import K_sweep
import linear_training
from utils.algebra.moments import held_out_path
from utils.data.load import LabelledTexts, load_splits
from utils.models.adapters import BASE_MODEL_FILE
from utils.models.load import load_causal_lm, load_config, model_fingerprint
from utils.models.states import decoder_layers, decoder_of
from utils.models.table import LORA_TARGET_MODULES, MODELS
from utils.parallel import object_of_first
from utils.results import check_identity, read_stored, result_path, save_json, write_atomically
from utils.script import UserError, run_script
from utils.settings import Run, Unrecorded, check, result_settings, with_values
from utils.training.finetune import FinetuningConfig, Hyperparameters, Trainable, compare, finetune, print_comparison
from utils.training.loop import find_finished, make_identity

if TYPE_CHECKING:
    from peft import PeftModel

COMPARISON = "before_after.json"


@dataclass(frozen=True)
class Output(Unrecorded):
    """Optional results."""

    ntps_after: bool = False  # also compare NTPS before and after, linear probe and gain, in one table


@dataclass(frozen=True, kw_only=True)
class Config(FinetuningConfig):
    """Edit the defaults here, or override any of them from the shell."""

    rank: int = 32  # r of LoRA
    alpha: float = 32.0  # B A has the factor alpha / r
    lora_dropout: float = 0.05  # dropout on the input of A
    target_modules: tuple[str, ...] | None = None  # projections that get LoRA; None: query, key, value of the family
    start_layer: int = 0  # the first decoder layer that gets LoRA, counted from 0
    training: Hyperparameters = Hyperparameters(
        pooling="mean", dropout=0.05, num_steps=5000, batch_size=1, gradient_accumulation=1,
        learning_rate=1e-4, weight_decay=1e-5, warmup=0.05, steps_per_evaluation=500,
    )  # fmt: skip
    output: Output = Output()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model.adapter_dir:
            raise ValueError("--adapter_dir has no use here: LoRA trains on a plain model. Name a merged model instead")
        check(self, "at least 1", "rank")
        check(self, "positive, below 3e38", "alpha")
        check(self, "in [0, 1)", "lora_dropout")


def add_adapter(model: torch.nn.Module, config: Config) -> "PeftModel":
    """The causal LM with LoRA in its projections; only LoRA's weights require a gradient."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    decoder, name = decoder_of(model), config.model.model_name
    targets = config.target_modules or LORA_TARGET_MODULES.get(decoder.config.model_type, ())
    num_layers = len(decoder_layers(decoder))
    kinds = {path.rsplit(".", 1)[-1]: type(module) for path, module in decoder.named_modules()
             if isinstance(module, torch.nn.Linear | Conv1D)}  # fmt: skip
    if not targets or (missing := set(targets) - set(kinds)):
        wrong = f"{name} has no {', '.join(sorted(missing))}" if targets else f"No projections of {name} are known"
        raise UserError(f"{wrong}. Choose --target_modules among those of its decoder: {', '.join(sorted(kinds))}.")
    if not 0 <= config.start_layer < num_layers:
        raise UserError(f"--start_layer is {config.start_layer}; {name} has layers 0 to {num_layers - 1}.")
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.lora_dropout,
        target_modules=list(targets),
        layers_to_transform=list(range(config.start_layer, num_layers)) if config.start_layer else None,
        fan_in_fan_out=any(kinds[target] is Conv1D for target in targets),  # GPT-2 keeps its matrices transposed
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        peft_model: Any = get_peft_model(model, lora)  # type: ignore[arg-type]
    except ValueError as error:
        raise UserError(f"LoRA changes nothing in {name} ({error}). Change --target_modules.") from None
    # PEFT would store the path that the model was loaded from; for `tiny` that is a path on this machine
    peft_model.active_peft_config.base_model_name_or_path = MODELS[name].path if name in MODELS else name
    return peft_model


def build(config: Config) -> Trainable:
    """The decoder inside the PEFT model (training then computes no logits), and the function that saves the adapter."""
    peft_model = add_adapter(load_causal_lm(config.model, config.run), config)
    causal_lm: Any = peft_model.get_base_model()

    def save(folder: Path) -> None:
        (folder / COMPARISON).unlink(missing_ok=True)  # of an earlier adapter
        with write_atomically(folder / "adapter") as temporary:
            # the embeddings are not trained: PEFT need not ask the hub for a changed vocabulary
            peft_model.save_pretrained(str(temporary), save_embedding_layers=False)
            save_json(temporary / BASE_MODEL_FILE, {"fingerprint": model_fingerprint(config.model, config.run)})

    return decoder_of(causal_lm), save


def stored_settings(config: Config) -> tuple[cache.Config, K_sweep.Config]:
    """Settings for the plain model's moments and scores: read from stored scores or moments, else the defaults."""
    run, model = replace(config.run, overwrite=False), with_values(config.model, dtype="float32")
    moments = cache.Config(pooling=config.training.pooling, model=model, data=config.data, run=run)
    sweep = K_sweep.Config(model=model, data=config.data, run=replace(run, device="cpu"))
    scores_path, moments_path, made = K_sweep.output_path(sweep), cache.config_path(moments), None
    if scores_path.is_file():
        stored = read_stored(scores_path)
        options = {name: stored["config"][name] for name in ("num_null_draws", "num_random_draws", "seed")}
        sweep, made = with_values(sweep, **options, fractions=tuple(stored["config"]["fractions"])), stored["moments"]
    elif moments_path.is_file():
        made = read_stored(moments_path)
    if made:
        free = {name: made["config"][name] for name in ("num_folds", "product_dtype", "dtype")}
        moments = with_values(moments, **free)  # --dtype is that of the training
    return moments, replace(sweep, model=moments.model)


def sweep_model(moments: cache.Config, sweep: K_sweep.Config, data: dict[str, LabelledTexts]) -> dict:
    """The result of K_sweep.py for one model; replaces the result of an earlier adapter at the same path."""
    identity, path = cache.identity_of(moments, data["train"]), K_sweep.output_path(sweep)

    def run_at(path: Path) -> Run:
        stored = read_stored(path) if moments.model.adapter_dir and path.is_file() else {}
        fingerprint = stored.get("moments", stored).get("model_fingerprint", identity["model_fingerprint"])
        return replace(moments.run, overwrite=fingerprint != identity["model_fingerprint"])

    run = run_at(path)
    if path.is_file() and not run.overwrite and not cache.config_path(moments).is_file():
        stored = read_stored(path)  # a study deletes moments that it no longer needs
        check_identity(stored, {"config": result_settings(sweep)}, path)
        check_identity(stored["moments"], identity, path)
        if held_out := stored["held_out"]:  # without it, both passes run
            check_identity({"config": {}, **held_out}, {"config": {}, "fingerprint": data["test"].fingerprint}, path)
            return stored
    for split in ("train", "test"):
        wanted = with_values(moments, split=split)
        cache.ensure(replace(wanted, run=run_at(cache.config_path(wanted))), data[split])
    on_cpu = replace(sweep, run=replace(run, device="cpu"))
    moments_path = cache.config_path(moments)
    return object_of_first(lambda: K_sweep.score(on_cpu, moments_path, held_out_path(moments_path, "train")))


def probe_metrics(config: Config, dtype: str, data: dict[str, LabelledTexts]) -> dict:
    """The stored result of linear_training.py with any hyperparameters; if missing, trains with the defaults."""
    run, model = replace(config.run, overwrite=False), with_values(config.model, dtype=dtype)
    probe = linear_training.Config(config.training.pooling, model=model, data=config.data, run=run)
    path = result_path("linear_training", run, model, config.data) / "metrics.json"
    if not path.is_file():
        return linear_training.run(probe, data)
    metrics, identity = read_stored(path), make_identity(probe, data) | {"label_names": data["train"].label_names}
    for name in {*vars(probe), "dtype"} - {"pooling"}:
        identity["config"].pop(name, None)
    check_identity(metrics, identity, path)
    return metrics


def main(config: Config) -> None:
    """Trains unless a finished run exists; with --ntps_after also writes and prints NTPS before and after."""
    load_config(config.model, config.run)  # refuses a wrong name before it reads the data
    data = load_splits(config.data, config.run)
    folder = result_path("lora", config.run, config.model, config.data)
    if not config.output.ntps_after:
        finetune(config, "lora", build, data)
        return
    object_of_first(lambda: find_finished(config, folder, data))  # refuses a finished run of other settings
    moments, sweep = stored_settings(config)
    before = sweep_model(moments, sweep, data)
    probe = probe_metrics(config, moments.model.dtype, data)
    metrics = finetune(config, "lora", build, data)
    adapted = {"adapter_dir": folder / "adapter"}
    after = sweep_model(with_values(moments, **adapted), with_values(sweep, **adapted), data)
    result = compare(before, after, probe, metrics)
    object_of_first(lambda: save_json(folder / COMPARISON, result))
    print_comparison(result)
    print(folder / COMPARISON)


if __name__ == "__main__":
    run_script(main, Config, __doc__, share_work=True)
