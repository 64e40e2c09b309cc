"""Make the twin of a model: the same architecture and tokenizer with random weights, as a control.

    python -m demo.random_twin --model_name smollm2      # then --model_name demo/runs/smollm2-random in every script
    python -m demo.random_twin --model_name Qwen/Qwen2-0.5B --seed 1

Reads the model's configuration and tokenizer, none of its weights. Writes demo/runs/<model>-random/, or with another
seed <model>-seed<k>-random/: model.safetensors in bfloat16, config.json and the tokenizer, all at once. transformers
draws the weights as it does before training; the same seed gives the same weights. A score that the twin shares does
not come from pretraining.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

from dataclasses import dataclass
from pathlib import Path

import torch

from utils.hub import hub_errors
from utils.models.load import load_config, load_tokenizer
from utils.models.table import repository
from utils.results import check_replaceable, write_atomically
from utils.script import run_script
from utils.settings import Model, Run, check, path_name


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    model_name: str = "smollm2"  # model that gives architecture and tokenizer
    seed: int = 0  # seed of the weights
    output_dir: Path | None = None  # by default a folder in demo/runs, named after the model and the seed
    overwrite: bool = False  # replace a twin that exists

    def __post_init__(self) -> None:
        check(self, "from 0 to 4294967295", "seed")


def main(config: Config) -> None:
    """Writes the twin unless it exists; prints its folder. Raises UserError if the folder holds other files."""
    from transformers import AutoModelForCausalLM

    of_seed = f"-seed{config.seed}" if config.seed else ""
    folder = config.output_dir or Path("demo/runs") / f"{path_name(config.model_name)}{of_seed}-random"
    if (folder / "config.json").is_file() and not config.overwrite:
        print(f"already there, --overwrite makes it again\n{folder}")
        return
    check_replaceable(folder, "config.json")
    model, run = Model(config.model_name), Run()
    model_config = load_config(model, run)
    tokenizer = load_tokenizer(model, run, model_config)
    torch.manual_seed(config.seed)
    with hub_errors(repository(config.model_name)):
        twin = AutoModelForCausalLM.from_config(model_config, dtype=torch.float32)
    with write_atomically(folder) as temporary:
        twin.bfloat16().save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
    print(folder)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
