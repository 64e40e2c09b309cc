"""What a study consists of: the files that have to be there, and the flags of the commands that make them.

runs/Snakefile asks this file; each runs/<study>.yaml is read into a `Grid`. Snakemake runs in an environment of its
own, without torch, so nothing of the scripts is imported here.
"""

import functools
import shlex
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# what may be asked of a model, in `seeds`: how many seeds of each
KINDS = ("closed_form", "probe", "lora", "ntps_after", "full_finetuning", "from_scratch")
SCRIPTS = (
    *("cache", "linear_sklearn", "linear_training", "linear_training_converged"),
    *("lora", "full_finetuning", "from_scratch"),
)
SETTINGS = {"study", "flags", "scripts", "controls", "controls_after", "models", "datasets", "only", "alignment"}
SETTINGS |= {"dataset_flags", "resources", "after", "results_dir"}
DATA_FILES = {".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gguf"}


def folder_name(name: str) -> str:
    """The name under results of a model or dataset, as utils/script.py gives it once the model is there."""
    path = Path(name)
    if path.suffix in DATA_FILES:
        return path.stem
    if path.is_dir() or name.count("/") > 1:
        return path.resolve().name
    return name.strip("/").replace("/", "__")


def to_flags(settings: dict[str, Any]) -> str:
    """Settings as a person types them: `{"seed": 1, "ridge": True}` -> `--seed 1 --ridge`."""
    words = []
    for name, value in settings.items():
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no_{name}")
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


@dataclass(frozen=True)
class Grid:
    """One study, as its yaml file has it."""

    config: dict[str, Any]

    def __post_init__(self) -> None:
        """Ends with one sentence where the yaml file names what there is not."""
        known = {"models": self.config.get("models", {}), "datasets": self.config.get("datasets", [])}
        wrong = [f"the setting {name!r}" for name in self.config.keys() - SETTINGS]
        wrong += [f"the script {name!r}" for name in self.config.get("scripts", {}).keys() - set(SCRIPTS)]
        named = {"only": [name for names in self.config.get("only", {}).values() for name in names]}
        named["dataset_flags"] = list(self.config.get("dataset_flags", {}))
        wrong += [f"the dataset {name!r}, in `{setting}`" for setting, names in named.items()
                  for name in names if name not in known["datasets"]]  # fmt: skip
        for model, spec in known["models"].items():
            wrong += [f"seeds of {kind!r}, at {model}" for kind in spec["seeds"].keys() - set(KINDS)]
        wrong += [f"the control {name!r}, in `controls_after`" for name in self.config.get("controls_after", [])
                  if name not in self.config.get("controls", {})]  # fmt: skip
        if wrong:
            sys.exit(f"error: a study knows nothing of {'; '.join(sorted(set(wrong)))}. Correct its yaml file.")
        if empty := [name for name, values in known.items() if not values]:
            sys.exit(f"error: the study has no {' and no '.join(empty)}. Name some in its yaml file.")

    @property
    def root(self) -> str:
        """Where the results of every seed are."""
        return f"{self.config.get('results_dir', 'results')}/study/{self.config['study']}"

    @functools.cached_property
    def models(self) -> dict[str, str]:
        """--model_name of each folder of results."""
        return {folder_name(name): name for name in self.config["models"]}

    @functools.cached_property
    def datasets(self) -> dict[str, str]:
        """--dataset_name of each folder of results."""
        return {folder_name(name): name for name in self.config["datasets"]}

    @property
    def controls(self) -> dict[str, dict[str, Any]]:
        """Flags of K_sweep.py by what they add to the name of its file: `.smallest`, `.random`; "" for none."""
        return {"" if not flags else f".{name}": flags for name, flags in self.config["controls"].items()}

    # -------------------------------------------------------------- commands
    def flags(self, script: str, seed: str, model: str, dataset: str, **more: Any) -> str:
        """The flags of a cell's command.

        Args:
            script: whose settings in the yaml apply.
            seed, model, dataset: as in the names of its files.
            more: flags of this cell alone.
        """
        name = self.models[model]
        settings = {"model_name": name, "dataset_name": self.datasets[dataset], "seed": seed}
        settings |= self.config.get("flags", {}) | self.config["models"][name].get("flags", {})
        settings |= self.config.get("dataset_flags", {}).get(self.datasets[dataset], {})
        own = self.config.get("scripts", {}).get(script, {}) | more
        return to_flags(settings | own | {"results_dir": f"{self.root}/seed{seed}"})

    def adapter(self, seed: str, model: str, dataset: str) -> str:
        """Where lora_finetuning.py puts the adapter of a cell."""
        return f"{self.root}/seed{seed}/lora/{model}/{dataset}/adapter"

    # -------------------------------------------------------------- what has to be there
    def num_seeds(self, kind: str, model: str, dataset: str) -> int:
        """Seeds of one kind of cell; what is trained has the probes beside it that its gain is measured from."""
        seeds = self.config["models"][self.models[model]]["seeds"]

        def asked(kind: str) -> int:
            return seeds.get(kind, 0) if self.datasets[dataset] in self.config.get("only", {}).get(
                kind, self.config["datasets"]) else 0  # fmt: skip

        needs = {"probe": ("probe", "lora"), "closed_form": ("closed_form", "probe", "lora")}
        return max(asked(needed) for needed in needs.get(kind, (kind,)))

    def results_of(self, model: str, dataset: str, seed: int) -> Iterator[str]:
        """The results of one model, dataset and seed, without the folder of the seed."""
        has = {kind: seed < self.num_seeds(kind, model, dataset) for kind in KINDS}
        if has["closed_form"]:
            yield from (f"ntps/{model}/{dataset}{control}.json" for control in self.controls)
            yield f"linear_sklearn/{model}/{dataset}.json"
        if has["probe"]:
            yield f"linear_training/{model}/{dataset}/metrics.json"
            if "linear_training_converged" in self.config.get("scripts", {}):
                yield f"linear_training/{model}/{dataset}.standardized/metrics.json"
        yield from (f"{kind}/{model}/{dataset}/metrics.json" for kind in KINDS[-2:] if has[kind])
        if has["lora"]:
            yield f"lora/{model}/{dataset}/metrics.json"
            if has["ntps_after"]:
                yield f"lora/{model}/{dataset}/before_after.json"
                after = [name for name in self.config.get("controls_after", []) if self.config["controls"][name]]
                yield from (f"ntps/{model}+lora/{dataset}.{name}.json" for name in after)

    def targets(self, first_seed: bool = False) -> list[str]:
        """Every result of the study, or those of seed 0."""
        cells = [(model, dataset) for model in self.models for dataset in self.datasets]
        last = 1 if first_seed else max(self.num_seeds(kind, *cell) for kind in KINDS for cell in cells)
        found = [
            f"{self.root}/seed{seed}/{result}"
            for seed in range(last)
            for cell in cells
            for result in self.results_of(*cell, seed)
        ]
        return found + [
            f"{self.root}/seed0/alignment/{folder_name(at['model'])}/{folder_name(at['dataset'])}.layer{at['layer']}.json"
            for at in self.config.get("alignment", [])
        ]

    # -------------------------------------------------------------- what the cells need
    def memory(self, rule: str, model: str) -> int:
        """Megabytes of main memory of a cell at its first attempt: libraries, weights, and what the rule adds to them.

        A pass of cache.py keeps 32 bytes for each entry of a d x d matrix of each layer (M, C0 and C1 in float64, their
        products in float32), and the folds of the last layer. Training keeps activations and, of what is trained,
        weights and gradients in float32. The factors are bytes for each parameter or each entry of a matrix. Of SmolLM2
        they ask 2.4 GB for cache, 1.6 for K_sweep and linear_sklearn, 2.0 for linear_training and 3.1 for lora; the
        largest peaks of its cells were 1.7, 1.0, 0.7, 0.7 and 2.9 GB.
        """
        spec = self.config["models"][self.models[model]]
        weights, width, layers = (float(spec.get(name, 0)) for name in ("parameters", "hidden_size", "num_layers"))
        square = 8 * width**2
        added = {
            "cache": 4 * weights + 4 * (layers + 1) * square + 5 * square,
            "K_sweep": 24 * square,
            "linear_sklearn": 24 * square,
            "linear_training": 4 * weights,
            "alignment": 4 * weights + 12 * square,
            "lora": 12 * weights,
            "full_finetuning": 24 * weights,
            "from_scratch": 24 * weights,
        }
        return 1500 + round(added[rule] / 1e6)

    def resources(self, rule: str) -> dict[str, Any]:
        """Resources of a rule as Snakemake takes them; each attempt after the first has more memory and time."""
        asked = {"runtime": 60} | self.config.get("resources", {}).get(rule, {})
        runtime = asked.pop("runtime")
        found: dict[str, Callable[..., int] | int | str] = {
            "mem_mb": lambda wildcards, attempt: attempt * self.memory(rule, wildcards.model),
            "runtime": lambda wildcards, attempt: attempt * runtime,
        }
        return found | asked
