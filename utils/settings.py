"""Define the settings that the scripts share: model, texts, device and folders, saved states of a training run.

A script's `Config` holds its own fields and these groups. Flags do not name the group (`--model_name`, not
`--model.model_name`), and a stored result holds its settings as one flat dictionary.
"""

import dataclasses
import json
import os
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

Dtype = Literal["float32", "bfloat16", "float16"]
AnyConfig = TypeVar("AnyConfig")
DATASETS_DIR = Path(os.environ["NTPS_DATASETS_DIR"]) if os.environ.get("NTPS_DATASETS_DIR") else None
LOCAL_NAMES = ("model_name", "tokenizer_name", "adapter_dir", "dataset_name")  # each may be a path on this machine
# folder names that many trainings share; results need the name of the parent folder too
GENERIC = r"(global_?)?(checkpoint|ckpt|epoch|step|iter)[-_]?\d+|checkpoint|final|best|last|model|adapter|merged"


class Unrecorded:
    """Settings that cannot affect results; not stored or compared."""


# ------------------------------------------------------------------ names and paths
def expand(config: Any) -> None:
    """Replaces a leading `~` by the home folder, in each path of a config and each name that can be a path."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            expand(value)
        elif (isinstance(value, Path) or field.name in LOCAL_NAMES) and str(value).startswith("~"):
            object.__setattr__(config, field.name, type(value)(os.path.expanduser(value)))


def resolve(name: str) -> str:
    """The absolute path of a file or folder on this machine, with its `:subset`; any other name unchanged."""
    folder, _, subset = name.rpartition(":")
    if not Path(name).exists() and folder and Path(folder).is_dir():
        return f"{Path(folder).resolve()}:{subset}"
    if Path(name).is_file():
        return os.path.abspath(name)  # a link to a file keeps its name
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def is_same_setting(name: str, stored: Any, asked: Any) -> bool:
    """True if a stored setting equals the one asked for; local models and datasets may move: fingerprints decide."""
    if stored == asked or name not in LOCAL_NAMES or not isinstance(stored, str) or not isinstance(asked, str):
        return stored == asked
    return (os.path.isabs(stored) or os.path.isabs(asked)) and Path(stored).name == Path(asked).name


def path_name(name: str) -> str:
    """The name of a model or dataset under results: `Qwen/Qwen2-0.5B` -> `Qwen__Qwen2-0.5B`, a file -> its stem.

    The names of its parents precede a generic name such as `checkpoint-500`. Braces, which Snakemake would expand,
    become parentheses.
    """
    path = Path(resolve(name))
    if not path.is_absolute() and path.suffix != ".gguf":  # a deleted .gguf file keeps its name
        return name.strip("/").replace("/", "__")
    own = path.stem if path.is_file() or path.suffix == ".gguf" else path.name
    parts = [own.replace(":", "__")]
    for parent in path.parents:
        if not re.fullmatch(GENERIC, parts[0]) or not parent.name:
            break
        parts.insert(0, parent.name)
    return "__".join(parts).translate(str.maketrans("{}", "()"))


# ------------------------------------------------------------------ checks
RULES: dict[str, Callable[[float], bool]] = {  # nan breaks every rule
    "at least 1": lambda value: value >= 1,
    "at least 0, below 3e38": lambda value: 0 <= value < 3e38,
    "positive, below 3e38": lambda value: 0 < value < 3e38,  # float32 ends there
    "in [0, 1)": lambda value: 0 <= value < 1,
    "from 0 to 4294967295": lambda value: 0 <= value < 2**32,  # the seeds of numpy and scikit-learn
}


def check(group: Any, rule: str, *names: str) -> None:
    """Raises ValueError if one of these settings breaks a rule of `RULES`; None breaks none."""
    for name in names:
        value = getattr(group, name)
        if value is not None and not RULES[rule](value):
            raise ValueError(f"--{name} must be {rule}, not {value}")


# ------------------------------------------------------------------ groups
@dataclass(frozen=True)
class Model:
    """The model, and the number of tokens of a text that it reads."""

    model_name: str = "tiny"  # hub id, local folder, .gguf file, or a short name (docs/models_and_data.md)
    revision: str | None = None  # commit or tag of the model
    tokenizer_name: str | None = None  # another repository or folder for the tokenizer
    adapter_dir: Path | None = None  # LoRA adapter merged into the model; results go to <model>+lora
    dtype: Dtype = "float32"  # dtype of the model; sums over texts are always float64
    max_length: int | None = None  # tokens per text; None: the model's context

    def __post_init__(self) -> None:
        check(self, "at least 1", "max_length")

    @property
    def path_name(self) -> str:
        """The model's folder under results: its name, with `+lora` appended if it has an adapter."""
        return path_name(self.model_name) + ("+lora" if self.adapter_dir else "")


@dataclass(frozen=True)
class Data:
    """The labelled texts, and the sample of them that a run takes."""

    dataset_name: str = "docstrings/library"  # key of the table, hub id, local file or folder, or docstrings/<task>
    dataset_revision: str | None = None  # commit or tag of the dataset
    text_column: str | None = None  # column of the texts, in your own data
    label_column: str | None = None  # column of the labels, in your own data
    text_template: str | None = None  # joins columns of your own data: "{question} {choices}"
    task: Literal["auto", "classification", "regression"] = "auto"  # auto: regression if the labels are fractions
    ungrouped_split: bool = False  # split `medical` as in the paper: a question can be in train and in test
    divide_train: bool = False  # take 30 % of train as test rows, for a copy without a test split
    max_samples: int | None = None  # stratified sample of each split; None: all rows
    max_test_samples: int | None = None  # sample of the test split; None: as max_samples
    seed: int = 0  # seed of sampling, of splits made here, and of all random numbers

    def __post_init__(self) -> None:
        check(self, "at least 1", "max_samples", "max_test_samples")
        check(self, "from 0 to 4294967295", "seed")
        if self.text_template:  # a shell passes `\\n` as two characters
            template = self.text_template.replace("\\n", "\n").replace("\\t", "\t")
            object.__setattr__(self, "text_template", template)

    @property
    def path_name(self) -> str:
        """The dataset's folder or file under results."""
        return path_name(self.dataset_name)


@dataclass(frozen=True)
class Run(Unrecorded):
    """Device, folders and speed. Settings that cannot affect results; not stored or compared."""

    device: str = "auto"  # auto, cpu, cuda, cuda:1; under torchrun each process takes its own
    results_dir: Path = Path("results")  # folder of results, read and written
    datasets_dir: Path | None = DATASETS_DIR  # local copies of hub datasets; None: NTPS_DATASETS_DIR, else the hub
    overwrite: bool = False  # make an existing result again
    tokens_per_batch: int | None = None  # most padded tokens of a forward pass; None: 1,024 on a CPU, 8,192 on a GPU
    trust_remote_code: bool = False  # let a model repository run its own code
    debug: bool = False  # show the traceback behind an error

    def __post_init__(self) -> None:
        check(self, "at least 1", "tokens_per_batch")

    def batch_tokens(self, device: Any) -> int:
        """Most padded tokens of a forward pass on `device`; few on a CPU, whose caches larger batches exceed."""
        return self.tokens_per_batch or (1024 if device.type == "cpu" else 8192)


@dataclass(frozen=True)
class Placement(Unrecorded):
    """Devices of a model and of its sums. Settings that cannot affect results; not stored or compared."""

    device_map: Literal["none", "auto"] = "none"  # auto: layers on all GPUs, then in main memory, then on disk
    accumulate_on: Literal["auto", "device", "cpu"] = "auto"  # memory for the sums; auto: the device if they fit


@dataclass(frozen=True)
class Session(Unrecorded):
    """Saved states and tracker of a training run. Settings that cannot affect results; not stored or compared."""

    minutes_per_state: float = 3.0  # time between two saved states of an unfinished run
    track: Literal["none", "tensorboard", "trackio", "wandb"] = "none"  # also send the history to this tracker


# ------------------------------------------------------------------ a Config as one flat dictionary
def all_settings(config: Any, unrecorded: bool = True) -> dict[str, Any]:
    """Every setting of a config by the name of its flag, in JSON types; `unrecorded` ones only if asked for."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            flat[field.name] = value
        elif unrecorded or not isinstance(value, Unrecorded):
            flat |= all_settings(value)
    return json.loads(json.dumps(flat, default=str))


def result_settings(config: Any) -> dict[str, Any]:
    """The settings that can change a result, i.e. outside `Unrecorded` groups; local paths are absolute."""
    settings = all_settings(config, unrecorded=False)
    return settings | {name: resolve(settings[name]) for name in LOCAL_NAMES if settings.get(name)}


def with_values(config: AnyConfig, **values: Any) -> AnyConfig:
    """The config with settings replaced by name, in any group: `with_values(config, dtype="float32")`."""
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        group = getattr(config, field.name)
        if field.name in values:
            changes[field.name] = values.pop(field.name)
        elif dataclasses.is_dataclass(group):
            own = {name: values.pop(name) for name in all_settings(group) if name in values}
            changes |= {field.name: with_values(group, **own)} if own else {}
    if values:
        raise TypeError(f"{type(config).__name__} has no setting {', '.join(values)}")
    return dataclasses.replace(config, **changes)  # type: ignore[type-var]


def command_line(script: str, config: Any, names: set[str] | None = None) -> str:
    """The command that gives this config: its flags that differ from the defaults (only `names`, if given)."""
    default, words = all_settings(type(config)()), ["python", *script.split()]
    for name, value in all_settings(config).items():
        if value != default[name] and (names is None or name in names):
            if isinstance(value, bool):
                words.append(f"--{name}" if value else f"--no_{name}")
            else:
                words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)
