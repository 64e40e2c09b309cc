"""Show words in the top directions of the two eigenproblems of one layer: the paper's Figure 1.

    python alignment_vis.py                                          # embedded model and data, word embeddings
    python alignment_vis.py --layer -1                               # the last layer
    python alignment_vis.py --model_name apple/OpenELM-450M --dataset_name emotion
    python alignment_vis.py --words joy=lovely,amazing sad=horrible,lonely be=is,are

Reads results/moments/<model>/<dataset>/<split>.safetensors of cache.py, and the model.
Writes results/alignment/<model>/<dataset>.layer<k>.csv (a row per subspace and word), the same as .json with settings,
eigenvalues and separability, and a picture (.png, .pdf). Options other than the default are in the name:
<dataset>.layer0.test.csv, <dataset>.layer0.centered.csv.

Symbols: M, B, C0, C1 the moments of cache.py at the layer, d the hidden size, k --num_components. x is the state of a
word, (d,): the mean over its tokens when the word alone is the text.

    perception      B B' u   = lambda M u     U (d, k): largest lambda first, u' M u = 1      coordinates U' x
    autoregression  C1 C1' v = lambda C0 v    V (d, k): largest lambda first, v' C0 v = 1     coordinates V' x

An eigenvector has no sign of its own: it gets the one for which the first category is on average above the second,
on every axis; where the two means agree to 1e-6, the one for which the mean of all words is positive. (The largest
entry of the vector, the usual rule, has rivals of nearly its size among thousands: another dtype can swap them.)

Differs from the paper: largest eigenvalue first (in the released script axis 1 is the second eigenvector), no factor of
ten on one panel, and a measure of what the picture shows: silhouette, and leave-one-out accuracy of logistic regression
(scikit-learn, C = 1), over all k components, standardised, as the length of an eigenvector is a convention. Beside each
its mean under shuffled word labels; for two equal categories that of the accuracy is below one half, as the category
of the word left out is then the smaller one.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

import cache
from K_sweep import solve_generalized_eigenproblem
from utils.algebra.moments import LayerMoments, load_layer, numbers_of_layers
from utils.models.check import self_check
from utils.models.load import load_base_model, load_config, load_tokenizer
from utils.models.states import pool, visit_hidden_states
from utils.models.tokens import tokenize
from utils.pictures import plot_alignment, save_figure
from utils.results import find_result, one_run_at_a_time, open_tensors, result_path, save_json, write_atomically
from utils.script import UserError, environment, pick_device, run_script
from utils.separability import separability_of_groups
from utils.settings import Data, Model, Run, result_settings

PAPER_WORDS = (
    "Joy=lovely,enjoyable,amazing,delighted",
    "Sad=horrible,disappointing,unhappy,lonely",
    "Be=am,is,are,was,were",
)
# frequent in docstrings, the first two categories one token a word in the embedded model; chosen before any result
DOCSTRING_WORDS = ("Array=array,matrix,tensor,vector", "Text=string,text,token,word", "Be=is,are,be,was,were")

TIE = 1e-6  # eigenvalues whose difference is below this share of them count as equal


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell.

    Settings of model and data that you omit are read from the moments file.
    """

    layer: int = 0  # 0: word embeddings, as in the paper; negative: from the end, -1 after the final norm
    split: Literal["train", "test", "all"] = "train"  # rows U and V are solved on
    words: tuple[str, ...] | None = None  # category=a,b,c ...; the first two are told apart; None: words of the domain
    num_components: int = 2  # eigenvectors of each problem; the picture shows the first two
    center: bool = False  # subtract the means from the moments first; the paper does not
    num_shuffles: int = 40  # of the word labels: what the separability is by chance
    model: Model = Model()
    data: Data = Data()
    run: Run = Run()

    def __post_init__(self) -> None:
        if self.num_components < 2:
            raise ValueError("--num_components must be at least 2: the picture has two axes")
        if self.num_shuffles < 1:
            raise ValueError("--num_shuffles must be at least 1, or there is no chance level")


# ------------------------------------------------------------------ words
def parse_words(groups: tuple[str, ...]) -> dict[str, list[str]]:
    """Words by category, in the order given, from `category=a,b,c` each.

    Raises:
        UserError: not of this form, fewer than two categories, fewer than two words in one of the first two, or a
            category or word that comes twice.
    """
    categories: dict[str, list[str]] = {}
    usage = "Give categories of words such as --words joy=lovely,amazing sad=horrible,lonely be=is,are"
    for group in groups:
        category, found, listed = group.partition("=")
        category, words = category.strip(), [word.strip() for word in listed.split(",")]
        if not found or not category or "" in words:
            raise UserError(f"--words has {group!r}, which is not category=word,word. {usage}")
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
    device = pick_device(config.run.device)
    model_config = load_config(config.model, config.run)
    tokens = tokenize(words, load_tokenizer(config.model, config.run, model_config), model_config)
    model = load_base_model(config.model, config.run, device)
    self_check(model, tokens, config.model.model_name)
    input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(np.arange(len(words))))
    states: list[Tensor] = []

    def keep(layer: int, hidden_states: Tensor) -> None:
        if layer == config.layer:
            states.append(pool(hidden_states.double(), lengths, "mean"))

    visit_hidden_states(model, input_ids, keep)
    [found] = states
    if not (finite := found.isfinite().all(1)).all():
        word, dtype = words[int((~finite).nonzero()[0])], config.model.dtype
        raise UserError(f"The state of {word!r} at layer {config.layer} is not finite ({dtype}); see --dtype.")
    return found, tokens.lengths.tolist()


# ------------------------------------------------------------------ directions
def top_directions(factor: Tensor, denominator: Tensor, config: Config, name: str) -> tuple[Tensor, Tensor]:
    """The k eigenvectors of F F' u = lambda C u with the largest eigenvalues, (d, k), u' C u = 1; and these, (k,).

    Raises:
        UserError: fewer than k eigenvalues are positive, or two of them are equal: tied directions have no basis of
            their own, and the same rows in another order would give another picture.
    """
    solved = solve_generalized_eigenproblem(factor, denominator)
    k, num_positive = config.num_components, len(solved.eigenvalues)
    if num_positive < k:
        remedy = f"Set --num_components {num_positive}" if num_positive >= 2 else "Choose a dataset with more classes"
        remedy += ", or drop --center." if config.center else "."
        raise UserError(
            f"The {name} problem of {config.data.dataset_name} has {num_positive} informative directions at layer "
            f"{config.layer}, --num_components asks for {k}: the further ones have an arbitrary basis. {remedy}"
        )
    values = solved.eigenvalues[: k + 1]
    if (values.diff().abs() < TIE * values[:-1]).any():
        raise UserError(
            f"The {name} problem of {config.data.dataset_name} has equal eigenvalues at layer {config.layer} "
            f"({', '.join(f'{value:.7g}' for value in values)}), so that its axes are arbitrary, as for classes "
            "of equal size and fewer texts than dimensions. Take more texts, or another --layer."
        )
    return solved.vectors[:, :k], solved.eigenvalues[:k]


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


# ------------------------------------------------------------------ run
def complete_settings(config: Config, num_layers: int) -> Config:
    """The config with the layer counted from 0 and the words in full.

    Raises:
        UserError: the model has no such layer, or words that are not as `parse_words` asks.
    """
    [layer] = numbers_of_layers((config.layer,), num_layers)
    default = DOCSTRING_WORDS if config.data.dataset_name.startswith("docstrings/") else PAPER_WORDS
    categories = parse_words(config.words or default)
    words = tuple(f"{category}={','.join(listed)}" for category, listed in categories.items())
    return dataclasses.replace(config, layer=layer, words=words)


def output_path(config: Config) -> Path:
    """Where the JSON goes; options other than the default are in the name."""
    options = [f"layer{config.layer}", config.split, "centered" if config.center else "train"]
    ending = "".join(f".{option}" for option in options if option != "train")
    return result_path("alignment", config.run, config.model, config.data, f"{ending}.json")


def align(config: Config, moments: LayerMoments) -> dict:
    """Words in both subspaces, and how far their categories are apart there."""
    categories = parse_words(config.words or ())
    words = [word for listed in categories.values() for word in listed]
    labels = np.repeat(np.arange(len(categories)), [len(listed) for listed in categories.values()])
    solved = solve_layer(moments, config)  # before the model: what it refuses, it refuses at once
    states, num_tokens = word_states(config, words)
    subspaces, rows = {}, []
    for subspace, (vectors, eigenvalues) in solved.items():
        coordinates = (states @ orient(vectors, states, labels)).cpu().numpy()
        scores = separability_of_groups(coordinates, labels, config.num_shuffles, config.data.seed)
        subspaces[subspace] = {"eigenvalues": eigenvalues.tolist(), "separability": scores}
        for label, word, state in zip(labels, words, coordinates.tolist(), strict=True):
            components = {f"component_{i}": value for i, value in enumerate(state, 1)}
            rows.append({"subspace": subspace, "category": list(categories)[label], "word": word, **components})
    return {
        "categories": categories,
        "num_tokens": dict(zip(words, num_tokens, strict=True)),
        "subspaces": subspaces,
        "words": rows,
    }


def print_table(result: dict) -> None:
    """Prints the separability of both subspaces, and the one under shuffled labels."""
    config, categories = result["config"], result["categories"]
    titles = {"first_two": " / ".join(list(categories)[:2]), "all": f"all {len(categories)} categories"}
    rows = {
        (name, titles[group]): {
            measure.replace("_", "-"): f"{score['value']:.3f} ({score['shuffled']:6.3f}, {score['p']:.2f})"
            for measure, score in scores.items()
        }
        for subspace, name in (("U", "perception"), ("V", "autoregression"))
        for group, scores in result["subspaces"][subspace]["separability"].items()
    }
    where = f"layer {config['layer']}, {config['num_components']} components"
    print(f"\nseparability of {len(result['num_tokens'])} words, {where} (in brackets: mean of shuffled labels, p)")
    print(pd.DataFrame.from_dict(rows, orient="index").to_string())


def save_tables(result: dict, path: Path) -> None:
    """Writes the words' coordinates and a picture of them beside `path`."""
    words = pd.DataFrame(result["words"])
    with write_atomically(path.with_suffix(".csv")) as temporary:
        words.to_csv(temporary, index=False)
    print(path.with_suffix(".csv"))
    notes = {}
    for name, subspace in result["subspaces"].items():
        accuracy = subspace["separability"]["first_two"]["leave_one_out"]
        notes[name] = f"leave-one-out {accuracy['value']:.2f}, shuffled {accuracy['shuffled']:.2f}"
    save_figure(plot_alignment(words, notes), path)


def main(config: Config) -> None:
    """Writes the words' coordinates, their separability and a picture, and prints the separability."""
    wanted = cache.Config(split=config.split, model=config.model, data=config.data, run=config.run)
    moments_at, found = cache.find_moments(wanted, splits=(config.split,))
    config = dataclasses.replace(config, model=found.model, data=found.data)
    with open_tensors(moments_at) as (file, metadata):
        config = complete_settings(config, metadata["num_layers"])
        path = output_path(config)
        # not the environment: the same rows and settings give the same moments on any machine
        provenance = {k: v for k, v in metadata.items() if k not in ("environment", "pooled_crc32")}
        identity = {"config": result_settings(config), "moments": provenance}
        with one_run_at_a_time(path):
            result = find_result(path, identity, config.run)
            if result is None:
                moments = load_layer(file, metadata, config.layer, pick_device(config.run.device))
                aligned = align(config, moments)
                result = {**identity, "environment": environment(), "num_samples": metadata["num_samples"], **aligned}
            print_table(result)
            save_json(path, result)
            save_tables(result, path)  # the picture last: nothing is lost if it cannot be drawn
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
