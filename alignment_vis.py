"""Show words in the top directions of the two eigenproblems of one layer: the paper's Figure 1.

    python alignment_vis.py                                          # embedded model and data, word embeddings
    python alignment_vis.py --layer -1                               # the last layer
    python alignment_vis.py --words joy=lovely,amazing sad=horrible,lonely be=is,are

Reads results/moments/<model>/<dataset>/<split>.safetensors of cache.py, and the model.
Writes results/alignment/<model>/<dataset>.layer<k>.csv (a row per subspace and word), the same as .json with settings,
eigenvalues and separability, and a picture (.png, .pdf). The name shows options: <dataset>.layer0.test.centered.csv.

Symbols: M, B, C0, C1 the moments of cache.py at the layer, d the hidden size, k --num_components. x is the state of a
word, (d,): the mean over its tokens when the word alone is the text.

    perception      B B' u   = lambda M u     U (d, k): largest lambda first, u' M u = 1      coordinates U' x
    autoregression  C1 C1' v = lambda C0 v    V (d, k): largest lambda first, v' C0 v = 1     coordinates V' x

Differs from the paper: the largest eigenvalue comes first (axis 1 of the released script is the second eigenvector), no
panel has a factor of ten, and two numbers measure the picture over all standardised components: silhouette, and
leave-one-out accuracy of logistic regression. Beside each is its mean under shuffled word labels; for two equal
categories that mean accuracy is below one half, because a word left out makes its category the smaller one.
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
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
from utils.separability import separability
from utils.settings import Data, Model, Run, result_settings

JOY, SAD = "Joy=lovely,enjoyable,amazing,delighted", "Sad=horrible,disappointing,unhappy,lonely"
PAPER_WORDS = (JOY, SAD, "Be=am,is,are,was,were")
# frequent words of docstrings, in the first two categories of one token each (embedded model); chosen before any result
DOCSTRING_WORDS = ("Array=array,matrix,tensor,vector", "Text=string,text,token,word", "Be=is,are,be,was,were")
TIE = 1e-6  # two eigenvalues count as equal if they differ by less than this share


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell.

    Settings of model and data that you omit are read from the moments file.
    """

    layer: int = 0  # 0: word embeddings, as in the paper; negative: from the end, -1 after the final norm
    split: Literal["train", "test", "all"] = "train"  # rows that give U and V
    words: tuple[str, ...] | None = None  # category=a,b,c ...; None: the paper's words, or ours for docstrings
    num_components: int = 2  # eigenvectors of each problem; the picture shows the first two
    center: bool = False  # subtract the means from the moments first; the paper does not
    num_shuffles: int = 40  # shuffles of the word labels, for the separability by chance
    model: Model = Model()
    data: Data = Data()
    run: Run = Run()

    def __post_init__(self) -> None:
        if self.num_components < 2 or self.num_shuffles < 1:
            raise ValueError("--num_components must be at least 2, for two axes, and --num_shuffles at least 1")


# ------------------------------------------------------------------ words
def parse_words(groups: tuple[str, ...]) -> dict[str, list[str]]:
    """Words by category, in the order given, from `category=a,b,c` each.

    Raises:
        UserError: another form, a category or word twice, or fewer than two words in one of the first two categories.
    """
    categories: dict[str, list[str]] = {}
    for group in groups:
        category, _, listed = group.partition("=")
        categories[category.strip()] = [word.strip() for word in listed.split(",")]
    words = [word for listed in categories.values() for word in listed]
    is_short = len(categories) < 2 or min(len(listed) for listed in [*categories.values()][:2]) < 2
    if is_short or "" in (*categories, *words) or len(categories) < len(groups) or len({*words}) < len(words):
        raise UserError(
            "--words needs two or more categories such as joy=lovely,amazing sad=horrible,lonely be=is,are, each "
            f"category and word once, and two words or more in each of the first two; not {' '.join(groups)}."
        )
    return categories


@torch.inference_mode()
def word_states(config: Config, words: list[str]) -> tuple[Tensor, list[int]]:
    """States x of words at `config.layer`, (n, d) float64 on the device, and tokens per word. Raises UserError."""
    device, model_config = pick_device(config.run.device), load_config(config.model, config.run)
    tokens = tokenize(words, load_tokenizer(config.model, config.run, model_config), model_config)
    model = load_base_model(config.model, config.run, device)
    self_check(model, tokens, config.model.model_name)
    input_ids, lengths = (tensor.to(device) for tensor in tokens.pad(np.arange(len(words))))
    states: dict[int, Tensor] = {}

    def keep(layer: int, hidden_states: Tensor) -> None:
        if layer == config.layer:
            states[layer] = pool(hidden_states.double(), lengths, "mean")

    visit_hidden_states(model, input_ids, keep)
    if not (finite := states[config.layer].isfinite().all(1)).all():
        word, dtype = words[int((~finite).nonzero()[0])], config.model.dtype
        raise UserError(f"The state of {word!r} at layer {config.layer} is not finite in {dtype}. Change --dtype.")
    return states[config.layer], tokens.lengths.tolist()


# ------------------------------------------------------------------ directions
def top_directions(factor: Tensor, denominator: Tensor, config: Config, name: str) -> tuple[Tensor, Tensor]:
    """The k eigenvectors of F F' u = lambda C u with the largest eigenvalues, (d, k), u' C u = 1; and these, (k,).

    Raises:
        UserError: fewer than k eigenvalues are positive, or two of them are equal: tied directions have no basis of
            their own, and the same rows in another order would give another picture.
    """
    solved, k = solve_generalized_eigenproblem(factor, denominator), config.num_components
    values = solved.eigenvalues[: k + 1]
    if len(values) < k or (values.diff().abs() < TIE * values[:-1]).any():
        found = ", ".join(f"{value:.7g}" for value in values)
        raise UserError(
            f"The {name} problem of {config.data.dataset_name} at layer {config.layer} has fewer than {k} positive "
            f"eigenvalues, or equal ones ({found}), so its axes are arbitrary. Try a smaller --num_components, another "
            "--layer, no --center, a dataset with more classes, or more texts than the model has dimensions."
        )
    return solved.vectors[:, :k], values[:k]


def oriented_coordinates(vectors: Tensor, states: Tensor, labels: np.ndarray) -> np.ndarray:
    """Coordinates (n, k) of states (n, d) along vectors (d, k); labels (n,) decide the sign of each eigenvector.

    The first category is on average above the second; if their means agree to 1e-6, the mean of all is positive.
    """
    coordinates = states @ vectors
    first, second = (coordinates[torch.from_numpy(labels == category)].mean(0) for category in (0, 1))
    mean, gap = coordinates.mean(0), first - second
    # the usual rule, a positive largest entry, is not stable: entries of nearly equal size can swap in another dtype
    decisive = torch.where(gap.abs() > 1e-6 * mean.abs(), gap, mean)
    return (coordinates * torch.where(decisive < 0, -1.0, 1.0)).cpu().numpy()


# ------------------------------------------------------------------ run
def align(config: Config, moments: LayerMoments, categories: dict[str, list[str]]) -> dict[str, Any]:
    """Computes the coordinates of the words in both subspaces, and the separability of their categories in each."""
    words = [word for listed in categories.values() for word in listed]
    labels = np.repeat(np.arange(len(categories)), [len(listed) for listed in categories.values()])
    groups = {"first_two": labels < 2} | ({"all": labels >= 0} if len(categories) > 2 else {})
    used = moments.centred() if config.center else moments
    b, m = used.pooled_label_cross_moment, used.pooled_second_moment
    c0, c1 = used.prefix_second_moment, used.prefix_next_cross_moment
    # before it loads the model, to refuse ties at once
    u, v = top_directions(b, m, config, "perception"), top_directions(c1, c0, config, "autoregression")
    states, num_tokens = word_states(config, words)
    subspaces, rows = {}, []
    for subspace, (vectors, eigenvalues) in (("U", u), ("V", v)):
        coordinates = oriented_coordinates(vectors, states, labels)
        scores = {
            name: separability(coordinates[group], labels[group], config.num_shuffles, config.data.seed)
            for name, group in groups.items()
        }
        subspaces[subspace] = {"eigenvalues": eigenvalues.tolist(), "separability": scores}
        for label, word, state in zip(labels, words, coordinates.tolist(), strict=True):
            components = {f"component_{i}": value for i, value in enumerate(state, 1)}
            rows.append({"subspace": subspace, "category": list(categories)[label], "word": word, **components})
    counts = dict(zip(words, num_tokens, strict=True))
    return {"categories": categories, "num_tokens": counts, "subspaces": subspaces, "words": rows}


def print_table(result: dict[str, Any]) -> None:
    """Prints the separability in both subspaces, beside that under shuffled labels."""
    config, first, second = result["config"], *[*result["categories"]][:2]
    settings = f"layer {config['layer']}, {config['num_components']} components"
    print(f"\nseparability of {len(result['num_tokens'])} words, {settings} (in brackets: mean of shuffled labels, p)")
    print(f"{'':<36}{'silhouette':<24}leave-one-out")
    for name, subspace in result["subspaces"].items():
        for group, scores in subspace["separability"].items():
            told = [f"{score['value']:.3f} ({score['shuffled']:6.3f}, {score['p']:.2f})" for score in scores.values()]
            words = f"{first} / {second}" if group == "first_two" else "all categories"
            print(f"{name:<4}{words:<32}{told[0]:<24}{told[1]}")


def save_tables(result: dict[str, Any], path: Path) -> None:
    """Writes the words' coordinates and a picture of them beside `path`."""
    import pandas as pd

    words = pd.DataFrame(result["words"])
    with write_atomically(path.with_suffix(".csv")) as temporary:
        words.to_csv(temporary, index=False)
    print(path.with_suffix(".csv"))
    scores = {name: of["separability"]["first_two"]["leave_one_out"] for name, of in result["subspaces"].items()}
    notes = {k: f"leave-one-out {score['value']:.2f}, shuffled {score['shuffled']:.2f}" for k, score in scores.items()}
    save_figure(plot_alignment(words, notes), path)


def main(config: Config) -> None:
    """Writes the words' coordinates, their separability and a picture, and prints the separability."""
    default = DOCSTRING_WORDS if config.data.dataset_name.startswith("docstrings/") else PAPER_WORDS
    categories = parse_words(config.words or default)
    words = tuple(f"{category}={','.join(listed)}" for category, listed in categories.items())
    wanted = cache.Config(split=config.split, model=config.model, data=config.data, run=config.run)
    moments_path, found = cache.find_moments(wanted, splits=(config.split,))
    with open_tensors(moments_path) as (file, metadata):
        [layer] = numbers_of_layers((config.layer,), metadata["num_layers"])
        config = dataclasses.replace(config, layer=layer, words=words, model=found.model, data=found.data)
        options = [f"layer{layer}", *([config.split] if config.split != "train" else []), *["centered"] * config.center]
        path = result_path("alignment", config.run, config.model, config.data, f".{'.'.join(options)}.json")
        # not the environment: the same rows and settings give the same moments on any machine
        provenance = {k: v for k, v in metadata.items() if k not in ("environment", "pooled_crc32")}
        identity = {"config": result_settings(config), "moments": provenance}
        with one_run_at_a_time(path):
            result = find_result(path, identity, config.run)
            if result is None:
                moments = load_layer(file, metadata, layer, pick_device(config.run.device))
                aligned = align(config, moments, categories)
                result = {**identity, "environment": environment(), "num_samples": metadata["num_samples"], **aligned}
            print_table(result)
            save_json(path, result)
            save_tables(result, path)  # the picture last: its failure loses nothing
    print(path)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
