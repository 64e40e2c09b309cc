"""List the files that a study must produce, and the flags of the commands that make them.

runs/Snakefile imports this file. Snakemake runs in an environment without torch, so this file imports no script, and
of utils/ only what needs no library.
"""

import functools
import itertools
import os
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from utils.settings import path_name

# keys of a model's `seeds`, which gives the number of seeds of each kind of result
KINDS = ("closed_form", "probe", "lora", "ntps_after", "full_finetuning", "from_scratch")
SCRIPTS = ("cache", "linear_sklearn", "linear_training", "linear_training_converged", "lora", *KINDS[-2:])
SETTINGS = {"study", "flags", "scripts", "controls", "controls_after", "models", "datasets", "only", "alignment",
            "dataset_flags", "resources", "after", "results_dir"}  # fmt: skip
POOLED_SUFFIX = ".pooled.npy"  # suffix of the pooled states beside the moments


def folder_name(name: str) -> str:
    """The folder name of a model or dataset under results; a path of several folders may be made by the study."""
    return path_name(os.path.abspath(name) if name.count("/") > 1 else name)


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
    """One study."""

    config: dict[str, Any]  # the content of its yaml file

    def __post_init__(self) -> None:
        """Exits with one sentence if the yaml file holds an unknown name, or lacks models or datasets."""
        models, datasets = self.config.get("models", {}), self.config.get("datasets", [])
        named = [  # the place in the file, the names used, the names known
            ("as a setting", self.config, SETTINGS),
            ("in `scripts`", self.config.get("scripts", {}), SCRIPTS),
            *(("in `only`", names, datasets) for names in self.config.get("only", {}).values()),
            ("in `dataset_flags`", self.config.get("dataset_flags", {}), datasets),
            ("in `controls_after`", self.config.get("controls_after", []), self.config.get("controls", {})),
            *((f"in `seeds` of {model}", spec["seeds"], KINDS) for model, spec in models.items()),
        ]
        wrong = [f"{name!r}, {place}" for place, used, known in named for name in used if name not in known]
        if wrong:
            sys.exit(f"error: the study has unknown names: {'; '.join(sorted(wrong))}. Correct its yaml file.")
        if not (models and datasets):
            sys.exit(f"error: the study has no {'datasets' if models else 'models'}. Name some in its yaml file.")

    @property
    def root(self) -> str:
        """The folder of all its results."""
        return f"{self.config.get('results_dir', 'results')}/study/{self.config['study']}"

    @functools.cached_property
    def models(self) -> dict[str, str]:
        """Each --model_name by its folder of results."""
        return {folder_name(name): name for name in self.config["models"]}

    @functools.cached_property
    def datasets(self) -> dict[str, str]:
        """Each --dataset_name by its folder of results."""
        return {folder_name(name): name for name in self.config["datasets"]}

    @property
    def controls(self) -> dict[str, dict[str, Any]]:
        """Flags of K_sweep.py by the suffix that they add to its file name: `.smallest`, `.random`; "" for none."""
        return {"" if not flags else f".{name}": flags for name, flags in self.config["controls"].items()}

    def flags(self, rule: str, cell: Any, **more: Any) -> str:
        """The flags of a cell's command: those of the yaml file for the script of this rule, and `more` of the rule.

        `cell` holds the wildcards of the result: seed, model, dataset and, for some rules, control or layer.
        """
        name, dataset = self.models[cell.model], self.datasets[cell.dataset]
        seed_dir = f"{self.root}/seed{cell.seed}"
        settings = {"model_name": name, "dataset_name": dataset, "seed": cell.seed}
        settings |= self.config.get("flags", {}) | self.config["models"][name].get("flags", {})
        settings |= self.config.get("dataset_flags", {}).get(dataset, {})
        script = {"cache_after": "cache", "K_sweep_after": "K_sweep", "before_after": "lora"}.get(rule, rule)
        settings |= self.config.get("scripts", {}).get(script, {}) | more
        if script == "K_sweep":
            settings |= self.controls[cell.control]
        if rule == "alignment":
            settings["layer"] = cell.layer
        if rule in ("cache_after", "K_sweep_after"):
            settings["adapter_dir"] = f"{seed_dir}/lora/{cell.model}/{cell.dataset}/adapter"
        return to_flags(settings | {"results_dir": seed_dir})

    def num_seeds(self, kind: str, model: str, dataset: str) -> int:
        """Number of seeds of one kind of result; LoRA also needs the probes, from which its gain counts."""
        seeds = self.config["models"][self.models[model]]["seeds"]
        only, name = self.config.get("only", {}), self.datasets[dataset]
        needs = {"probe": ("probe", "lora"), "closed_form": ("closed_form", "probe", "lora")}.get(kind, (kind,))
        return max(seeds.get(needed, 0) if name in only.get(needed, [name]) else 0 for needed in needs)

    def results_of(self, model: str, dataset: str, seed: int) -> Iterator[str]:
        """Yields the result paths of one model, dataset and seed, relative to the folder of the seed."""
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
        """The paths of all results of the study, or only of seed 0."""
        cells = list(itertools.product(self.models, self.datasets))
        last = 1 if first_seed else max(self.num_seeds(kind, *cell) for kind in KINDS for cell in cells)
        found = [f"{self.root}/seed{seed}/{result}" for seed in range(last) for cell in cells
                 for result in self.results_of(*cell, seed)]  # fmt: skip
        for figure in self.config.get("alignment", []):
            folder = f"{self.root}/seed0/alignment/{folder_name(figure['model'])}"
            found.append(f"{folder}/{folder_name(figure['dataset'])}.layer{figure['layer']}.json")
        return found

    def resources(self, rule: str) -> dict[str, Any]:
        """Resources of a rule for Snakemake; each further attempt gets more memory and time."""
        shared = {"K_sweep_after": "K_sweep", "linear_training_converged": "linear_training", "before_after": "cache"}
        asked = {"mem_mb": 4000, "runtime": 60} | self.config.get("resources", {}).get(shared.get(rule, rule), {})
        grown = ("mem_mb", "runtime")
        return asked | {name: lambda wildcards, attempt, first=asked[name]: attempt * first for name in grown}
