"""Show words in the top directions of the two eigenproblems of one layer: the paper's Figure 1.

    python alignment_vis.py                                          # embedded model and data, word embeddings
    python alignment_vis.py --layer -1                               # the last layer
    python alignment_vis.py --model_name apple/OpenELM-450M --dataset_name emotion
    python alignment_vis.py --words joy=lovely,amazing sad=horrible,lonely be=is,are

Reads results/moments/<model>/<dataset>/<split>.safetensors of cache.py, and the model.
Writes results/alignment/<model>/<dataset>.layer<k>.csv (a row per subspace and word), the same as .json with settings,
eigenvalues, boundaries and separability, and a picture (.png, .pdf). Options other than the default stand in the name:
<dataset>.layer0.test.csv, <dataset>.layer0.centered.csv.

Symbols: M, B, C0, C1 the moments of cache.py at the layer, d the hidden size, k --num_components. x is the state of a
word, (d,): the mean over its tokens when the word alone is the text.

    perception      B B' u   = lambda M u     U (d, k): largest lambda first, u' M u = 1      coordinates U' x
    autoregression  C1 C1' v = lambda C0 v    V (d, k): largest lambda first, v' C0 v = 1     coordinates V' x

An eigenvector has no sign of its own: it gets the one for which the first category lies on average above the second,
on every axis; where the two means agree to 1e-6, the one for which the mean of all words is positive. (The largest
entry of the vector, the usual rule, has rivals of nearly its size among thousands: another dtype can swap them.)

Differs from the paper: largest eigenvalue first (in the released script axis 1 is the second eigenvector), no factor of
ten on one panel, and a measure of what the picture shows: silhouette, and leave-one-out accuracy of logistic regression
(scikit-learn, C = 1), over all k components, standardised, as the length of an eigenvector is a convention. Beside each
its mean under shuffled word labels; for two equal categories that of the accuracy lies below one half, as the category
of the word left out is then the smaller one.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import silhouette_score
from torch import Tensor

import cache
from fig_plot.plotting import plot_alignment, save_figure, separating_line, standardize
from K_sweep import solve_generalized_eigenproblem
from utils.io import (
    UserError,
    check_same_settings,
    environment,
    load_json,
    model_path_name,
    open_tensors,
    path_name,
    pick_device,
    result_settings,
    run_script,
    save_json,
    write_atomically,
)
from utils.models import (
    Dtype,
    load_base_model,
    load_config,
    load_tokenizer,
    run_base_model,
    tokenize,
    visit_hidden_states,
)
from utils.moments import LayerMoments, load_layer, moments_path

PAPER_WORDS = (
    "Joy=lovely,enjoyable,amazing,delighted",
    "Sad=horrible,disappointing,unhappy,lonely",
    "Be=am,is,are,was,were",
)
# frequent in docstrings, the first two categories one token a word in the embedded model; chosen before any result
DOCSTRING_WORDS = ("Array=array,matrix,tensor,vector", "Text=string,text,token,word", "Be=is,are,be,was,were")
MODEL_FIELDS = ("model_name", "revision", "tokenizer_name", "adapter_dir", "dtype")


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    # These change the result: stored in the file, compared when the file is reused.
    model_name: str = "tiny"  # as given to cache.py
    dataset_name: str = "docstrings/library"  # as given to cache.py
    layer: int = 0  # 0: word embeddings, as in the paper; negative: from the end, -1 after the final norm
    split: Literal["train", "test", "all"] = "train"  # rows U and V are solved on
    words: tuple[str, ...] | None = None  # category=a,b,c ...; the first two are told apart; None: words of the domain
    num_components: int = 2  # eigenvectors of each problem; the picture shows the first two
    center: bool = False  # subtract the means from the moments first; the paper does not
    dtype: Dtype = "float32"  # of the model, as given to cache.py; the eigenproblems are float64
    revision: str | None = None  # commit or tag of the model, as given to cache.py
    tokenizer_name: str | None = None  # another repository or folder for the tokenizer, as given to cache.py
    adapter_dir: Path | None = None  # LoRA adapter merged into the model, as given to cache.py
    num_shuffles: int = 40  # of the word labels: what the separability is by chance
    seed: int = 0  # of the shuffles
    # These change only speed or place.
    device: str = "auto"  # auto, cpu, cuda, cuda:1
    results_dir: Path = Path("results")  # where moments are read and results go
    overwrite: bool = False  # recompute a file that is already complete
    trust_remote_code: bool = False  # let a model repository run its own code
    SPEED_OR_PLACE: ClassVar = ("device", "results_dir", "overwrite", "trust_remote_code")

    def __post_init__(self) -> None:
        if self.num_components < 2:
            raise ValueError("--num_components must be at least 2: the picture has two axes")
        if self.num_shuffles < 1:
            raise ValueError("--num_shuffles must be at least 1, or there is no chance level")


# ------------------------------------------------------------------ words
def parse_words(groups: tuple[str, ...]) -> dict[str, list[str]]:
    """Words by category, in the order given, from `category=a,b,c` each.

    Raises:
        UserError: not of this form, fewer than two categories, fewer than two words in one of the first two, an empty
            word, or a category or word that comes twice.
    """
    categories: dict[str, list[str]] = {}
    usage = "Give categories of words such as --words joy=lovely,amazing sad=horrible,lonely be=is,are"
    for group in groups:
        category, found, listed = group.partition("=")
        category, words = category.strip(), [word.strip() for word in listed.split(",")]
        if not found or not category:
            raise UserError(f"--words has {group!r}, which is not category=word,word. {usage}")
        if "" in words:
            raise UserError(f"--words has an empty word in {group!r}. {usage}")
        if category in categories:
            raise UserError(f"--words has the category {category!r} twice. Put its words into one list.")
        categories[category] = words
    if len(categories) < 2:
        raise UserError(f"--words has {len(categories)} categories; at least two are told apart. {usage}")
    for category in list(categories)[:2]:
        if len(categories[category]) < 2:
            raise UserError(f"--words has one word of {category!r}; the first two categories need two each. {usage}")
    flat = [word for words in categories.values() for word in words]
    if twice := sorted({word for word in flat if flat.count(word) > 1}):
        raise UserError(f"--words has {', '.join(twice)} more than once. Remove all but one.")
    return categories


@torch.inference_mode()
def word_states(config: Config, words: list[str]) -> tuple[Tensor, list[int]]:
    """States x of words at `config.layer`, (n, d) float64 on the device; and tokens per word.

    Raises:
        UserError: the model cannot be loaded, a word has no token, or a state is not finite.
    """
    settings, device = cache_settings(config), pick_device(config.device)
    model_config = load_config(settings)
    tokens = tokenize(words, load_tokenizer(settings, model_config), model_config)
    model = load_base_model(settings, device, config.adapter_dir)
    input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(np.arange(len(words))))
    states: list[Tensor] = []

    def keep(layer: int, hidden_states: Tensor) -> None:
        if layer == config.layer:
            states.append(cache.pool(hidden_states.double(), lengths, "mean"))

    with visit_hidden_states(model, keep):
        run_base_model(model, input_ids)
    [found] = states
    if not (finite := found.isfinite().all(1)).all():
        word = words[int((~finite).nonzero()[0])]
        raise UserError(f"The state of {word!r} at layer {config.layer} is not finite ({config.dtype}); see --dtype.")
    return found, tokens.lengths.tolist()


# ------------------------------------------------------------------ directions
def top_directions(factor: Tensor, denominator: Tensor, config: Config, name: str) -> tuple[Tensor, Tensor]:
    """The k eigenvectors of F F' u = lambda C u with the largest eigenvalues, (d, k), u' C u = 1; and these, (k,).

    Raises:
        UserError: fewer than k eigenvalues are positive; further ones are tied at zero and have no basis of their own.
    """
    vectors, eigenvalues, _ = solve_generalized_eigenproblem(factor, denominator)
    k, num_positive = config.num_components, vectors.shape[1]
    if num_positive < k:
        mend = f"Set --num_components {num_positive}" if num_positive >= 2 else "Choose a dataset with more classes"
        mend += ", or drop --center." if config.center else "."
        raise UserError(
            f"The {name} problem of {config.dataset_name} has {num_positive} informative directions at layer "
            f"{config.layer}, --num_components asks for {k}: the further ones have an arbitrary basis. {mend}"
        )
    return vectors[:, :k], eigenvalues[:k]


def solve_layer(moments: LayerMoments, config: Config) -> dict[str, tuple[Tensor, Tensor]]:
    """Eigenvectors (d, k) and eigenvalues (k,) of the perception problem "U" and of the autoregression problem "V"."""
    perception = (moments.pooled_label_cross_moment, moments.pooled_second_moment)
    if config.center:
        perception = (moments.pooled_label_covariance, moments.pooled_covariance)
    prefix_moment, next_moment = moments.autoregression(config.center)
    return {
        "U": top_directions(*perception, config, "perception"),
        "V": top_directions(next_moment, prefix_moment, config, "autoregression"),
    }


def orient(vectors: Tensor, states: Tensor, labels: np.ndarray) -> Tensor:
    """The vectors (d, k), each with the sign that the module docstring describes.

    Args:
        vectors: (d, k).
        states: of the words, (n, d).
        labels: category of each word, (n,).
    """
    coordinates = states @ vectors
    first, second = (coordinates[torch.from_numpy(labels == category)].mean(0) for category in (0, 1))
    mean, gap = coordinates.mean(0), first - second
    decisive = torch.where(gap.abs() > 1e-6 * mean.abs(), gap, mean)
    return vectors * torch.where(decisive < 0, -1.0, 1.0).to(vectors)


# ------------------------------------------------------------------ separability
def measure(coordinates: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Silhouette, and leave-one-out accuracy of logistic regression, of labels (n,) in standardised coordinates."""
    model = LogisticRegression()
    right = [
        model.fit(coordinates[others], labels[others]).predict(coordinates[[i]])[0] == labels[i]
        for i, others in enumerate(~np.eye(len(labels), dtype=bool))
    ]
    return {"silhouette": float(silhouette_score(coordinates, labels)), "leave_one_out": float(np.mean(right))}


def separability(coordinates: np.ndarray, labels: np.ndarray, config: Config) -> dict[str, dict[str, float]]:
    """Each score of `measure`, its mean under shuffled labels, and the share of shuffles that do as well.

    Args:
        coordinates: (n, k).
        labels: category of each word, (n,).
        config: num_shuffles and seed are read; the same seed shuffles alike in both subspaces.

    Returns:
        `value`, `shuffled` and `p` = (1 + as good shuffles) / (1 + shuffles), of each score.
    """
    random = np.random.default_rng(config.seed)
    mean, scale = standardize(coordinates)  # of all words at once: it sees no label
    coordinates = (coordinates - mean) / scale
    values = measure(coordinates, labels)
    draws = [measure(coordinates, random.permutation(labels)) for _ in range(config.num_shuffles)]
    result = {}
    for name, value in values.items():
        shuffled = np.array([draw[name] for draw in draws])
        as_good = int((shuffled >= value - 1e-9).sum())  # shuffles that swap two categories whole give the same value
        result[name] = {
            "value": value,
            "shuffled": float(shuffled.mean()),
            "p": (1 + as_good) / (1 + config.num_shuffles),
        }
    return result


def describe_subspace(coordinates: np.ndarray, labels: np.ndarray, config: Config) -> dict[str, Any]:
    """The line between the first two categories in the first two components, and the separability over all of them."""
    first_two = labels < 2
    groups = {"first_two": first_two}
    if not first_two.all():
        groups["all"] = np.ones_like(first_two)
    return {
        "boundary": separating_line(coordinates[first_two, :2], labels[first_two] == 0),
        "separability": {name: separability(coordinates[rows], labels[rows], config) for name, rows in groups.items()},
    }


# ------------------------------------------------------------------ run
def cache_settings(config: Config) -> cache.Config:
    """The settings of cache.py that this script shares; its seed and --overwrite mean something else."""
    shared = cache.shared_settings(config)
    return cache.Config(**{name: value for name, value in shared.items() if name not in ("seed", "overwrite")})


def cache_command(config: Config) -> str:
    """The command line that makes the moments."""
    wanted, default = cache_settings(config), cache.Config()
    names = ("model_name", "dataset_name", "split", *MODEL_FIELDS[1:], "results_dir")
    options = [f"--{name} {getattr(wanted, name)}" for name in names if getattr(wanted, name) != getattr(default, name)]
    return " ".join(["python cache.py", *options])


def find_moments(config: Config) -> Path:
    """The moments to solve; those of the embedded model are made if they are not there.

    Raises:
        UserError: no moments, naming the command that makes them.
    """
    model = model_path_name(config.model_name, config.adapter_dir)
    path = moments_path(config.results_dir, model, config.dataset_name, config.split)
    if not path.is_file():
        if model != "tiny" or not config.dataset_name.startswith("docstrings/"):
            raise UserError(f"No moments at {path}. Run: {cache_command(config)}")
        print(f"No moments at {path}: making them, as the embedded model takes seconds.")
        cache.main(cache_settings(config))
    return path


def complete_settings(config: Config, metadata: dict, num_layers: int, path: Path) -> Config:
    """The config with the layer counted from 0 and the words in full.

    Raises:
        UserError: moments of another model, a layer that is not there, or words that are not as `parse_words` asks.
    """
    stored, wanted = metadata["config"], result_settings(cache_settings(config))
    names = [name for name in MODEL_FIELDS if stored[name] != wanted[name]]
    if names:
        differing = "; ".join(f"{name}: {stored[name]!r} there, {wanted[name]!r} now" for name in names)
        again = f"{cache_command(config)} --overwrite"
        raise UserError(f"{path} was made with another model ({differing}). Ask for that one, or run: {again}")
    if not -num_layers <= config.layer < num_layers:
        raise UserError(
            f"There is no layer {config.layer}: {config.model_name} has layers 0 (embeddings) to {num_layers - 1}; "
            f"-{num_layers} to -1 count from the end."
        )
    default = DOCSTRING_WORDS if config.dataset_name.startswith("docstrings/") else PAPER_WORDS
    categories = parse_words(config.words or default)
    words = tuple(f"{category}={','.join(listed)}" for category, listed in categories.items())
    return dataclasses.replace(config, layer=config.layer % num_layers, words=words)


def result_path(config: Config) -> Path:
    """Where the JSON goes; options other than the default stand in the name."""
    options = [config.split, "centered" if config.center else "train"]
    name = ".".join([path_name(config.dataset_name), f"layer{config.layer}", *(o for o in options if o != "train")])
    model = model_path_name(config.model_name, config.adapter_dir)
    return config.results_dir / "alignment" / model / f"{name}.json"


def align(config: Config, moments: LayerMoments, metadata: dict) -> dict:
    """The result: words in both subspaces, and how far their categories lie apart there."""
    categories = parse_words(config.words or ())
    words = [word for listed in categories.values() for word in listed]
    labels = np.repeat(np.arange(len(categories)), [len(listed) for listed in categories.values()])
    solved = solve_layer(moments, config)  # before the model: what it refuses, it refuses at once
    states, num_tokens = word_states(config, words)
    subspaces, rows = {}, []
    for subspace, (vectors, eigenvalues) in solved.items():
        coordinates = (states @ orient(vectors, states, labels)).cpu().numpy()
        described = describe_subspace(coordinates, labels, config)
        subspaces[subspace] = {"eigenvalues": eigenvalues.tolist(), **described}
        for label, word, at in zip(labels, words, coordinates.tolist(), strict=True):
            place = {f"component_{i}": value for i, value in enumerate(at, 1)}
            rows.append({"subspace": subspace, "category": list(categories)[label], "word": word, **place})
    return {
        "config": result_settings(config),
        "environment": environment(),
        "moments": moments_provenance(metadata),
        "num_samples": metadata["num_samples"],
        "categories": categories,
        "num_tokens": dict(zip(words, num_tokens, strict=True)),
        "subspaces": subspaces,
        "words": rows,
    }


def moments_provenance(metadata: dict) -> dict:
    """What the moments were made from; not where: the same rows and settings give the same ones on any machine."""
    return {name: value for name, value in metadata.items() if name != "environment"}


def load_result(config: Config, metadata: dict, path: Path) -> dict | None:
    """The stored result, None where there is none or --overwrite is given.

    Raises:
        UserError: it was made with other settings, or from other moments.
    """
    if config.overwrite or not path.is_file():
        return None
    stored = load_json(path)
    check_same_settings(stored["config"], config, path)
    if stored["moments"] != moments_provenance(metadata):
        raise UserError(f"{path} was made from other moments. Recompute it with --overwrite.")
    return stored


def print_table(result: dict) -> None:
    """The separability of both subspaces, with what shuffled labels give, and how little the words can say."""
    config, categories = result["config"], result["categories"]
    titles = {"first_two": " / ".join(list(categories)[:2]), "all": f"all {len(categories)} categories"}
    num_compared, width = sum(map(len, list(categories.values())[:2])), max(map(len, titles.values()))
    where = f"layer {config['layer']}, {config['num_components']} components"
    print(f"\nseparability of {len(result['num_tokens'])} words, {where} (in brackets: mean of shuffled labels, p)")
    print(f"{'':<15}{'':<{width}}{'silhouette':>24}{'leave-one-out':>24}")
    for subspace, title in (("U", "perception"), ("V", "autoregression")):
        for group, scores in result["subspaces"][subspace]["separability"].items():
            cells = [f"{of['value']:.3f} ({of['shuffled']:6.3f}, {of['p']:.2f})" for of in scores.values()]
            print(f"{title:<15}{titles[group]:<{width}}" + "".join(f"{cell:>24}" for cell in cells))
    print(f"few words: one of the {num_compared} compared more or less is {1 / num_compared:.3f} of accuracy.\n")


def main(config: Config) -> None:
    """Writes the words' coordinates, their separability and a picture, and prints the separability."""
    moments_at = find_moments(config)
    with open_tensors(moments_at) as (file, metadata):
        config = complete_settings(config, metadata, file.get_slice("pooled_mean").get_shape()[0], moments_at)
        path = result_path(config)
        result = load_result(config, metadata, path)
        if result is None:
            moments = load_layer(file, metadata, config.layer, pick_device(config.device))
            result = align(config, moments, metadata)
    print_table(result)
    words = pd.DataFrame(result["words"])
    with write_atomically(path.with_suffix(".csv")) as temporary:
        words.to_csv(temporary, index=False)
    print(path.with_suffix(".csv"))
    boundaries, notes = {}, {}
    for name, subspace in result["subspaces"].items():
        of = subspace["separability"]["first_two"]["leave_one_out"]
        boundaries[name] = subspace["boundary"]
        notes[name] = f"leave-one-out {of['value']:.2f}, shuffled {of['shuffled']:.2f}"
    save_figure(plot_alignment(words, boundaries, notes), path)
    save_json(path, result)  # last: where the JSON is, CSV and picture are
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
