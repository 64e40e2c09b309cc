"""The mini study: a ladder of docstring LMs x docstring tasks x every script, one resumable cell after the other.

    python -m demo.study                # the whole of it; `make study` also collects it into fig_plot/data/
    python -m demo.study --scale quick  # the committed LM and its random twin only, one seed

Pretrains the ladder where it is missing (demo/pretrain.py). Writes what the scripts write, under
results/study/<scale>/seed<k>/, and what they print to results/study/<scale>/logs/. A finished cell is reused, so that
the same command goes on after an interruption; a cell that fails is named at the end, the others go on.

    closed form   cache.py on both splits, K_sweep.py (largest, smallest, V by PCA, random V), linear_sklearn.py
    probe         linear_training.py, the paper's settings
    LoRA          lora_finetuning.py, with NTPS before and after for the first seed
    fine-tuning   from_scratch.py, pretrained and random weights
"""

import utils  # isort: skip  # noqa: F401, before the libraries that read the environment

import contextlib
import multiprocessing
import os
import traceback
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

from demo.docstrings import TASKS
from utils.io import UserError, parse, run_script
from utils.settings import with_values

# all but the one with numbers as labels: the measures below are accuracies
PROBED_TASKS = tuple(name for name, task in TASKS.items() if not task.regression)
# those with 500 test rows or more, binary ones among them as many as the paper has
TRAINED_TASKS = (
    *("library", "kind", "returns", "raises", "private", "decorated", "parameters"),
    *("stdlib", "scipy", "torch", "sympy", "transformers"),
)
# 2,000 texts and 300 steps of 16, 2.4 epochs; from scratch twice as many, as in the paper
MAX_SAMPLES = 2000
FINETUNING: dict[str, Any] = {"batch_size": 16, "learning_rate": 2e-3, "dtype": "float32"}
NUM_STEPS = {"lora": 300, "full_finetuning": 300, "from_scratch": 600}
# which cells come first, over all models
TURNS = {"closed-form": 0, "probe": 1, "lora": 2, "full_finetuning": 3, "from_scratch": 3}
ONE_EPOCH = ("--epochs", "1", "--product_dtype", "float32")


@dataclass(frozen=True)
class Rung:
    """One model of the ladder."""

    name: str  # as --model_name
    pretraining: tuple[str, ...] = ()  # flags of demo/pretrain.py; none: the model is in the repository
    finetuned: bool = True  # LoRA and full fine-tuning too
    from_scratch: bool = True  # needs the architecture only: once for each, and not for the largest
    num_seeds: int = 1

    def kinds(self, seed: int) -> list[str]:
        """The ways of training it: all for the first seed, LoRA alone for further ones."""
        kinds = ["lora", "full_finetuning"] if self.finetuned else []
        if self.from_scratch:
            kinds.append("from_scratch")
        return kinds if seed == 0 else kinds[:1]


def early(name: str, epochs: str) -> tuple[str, ...]:
    """Flags of a shorter pretraining of `tiny`."""
    places = ("--output_dir", f"demo/runs/{name}", "--results_dir", f"demo/runs/{name}.state")
    return ("--size", "tiny", "--epochs", epochs, "--product_dtype", "float32", *places)


LADDER = (
    Rung("tiny", num_seeds=2),
    Rung("demo/runs/tiny-random", early("tiny-random", "0"), finetuned=False, from_scratch=False),  # control
    Rung("micro", ("--size", "micro", *ONE_EPOCH), num_seeds=2),
    Rung("demo/runs/tiny-early", early("tiny-early", "0.25"), from_scratch=False),
    Rung("small", ("--size", "small", *ONE_EPOCH), from_scratch=False),
)
QUICK_LADDER = (Rung("tiny"), LADDER[1])


@dataclass(frozen=True)
class Config:
    """Edit the defaults here, or override any of them from the shell."""

    scale: Literal["full", "quick"] = "full"  # quick: two models and one seed
    results_dir: Path = Path("results/study")  # results go to <results_dir>/<scale>
    num_workers: int = 2  # cells at a time, each on one thread
    compile: bool = False  # torch.compile the pretraining; needs a C++ compiler


@dataclass(frozen=True)
class Cell:
    """One call: `run()` makes it, once all of `needs` are done."""

    name: str
    run: partial
    needs: tuple[str, ...] = ()


# ------------------------------------------------------------------ cells, each run in a worker
def pretrain(rung: Rung, compile: bool) -> None:
    """Trains one model of the ladder."""
    from demo import pretrain

    pretrain.main(parse(pretrain.Config, [*rung.pretraining, *(["--compile"] if compile else [])]))


def closed_form(settings: dict[str, Any]) -> None:
    """Moments of both splits, NTPS with its controls, scikit-learn's probes."""
    import cache
    import K_sweep
    import linear_sklearn

    for split in ("train", "test"):
        cache.main(with_values(cache.Config(), **settings, split=split, save_pooled="all"))
    controls: tuple[dict[str, Any], ...] = (
        {},
        {"eigenvectors": "smallest"},
        {"subspace": "pca"},
        {"subspace": "random"},
    )
    for control in controls:
        K_sweep.main(with_values(K_sweep.Config(), **settings, **control, picture=False))
    linear_sklearn.main(with_values(linear_sklearn.Config(), **settings, num_workers=1, picture=False))


def linear_probe(settings: dict[str, Any]) -> None:
    """The paper's probe, by its 50 epochs of AdamW."""
    import linear_training

    linear_training.main(with_values(linear_training.Config(), **settings))


def finetune(kind: str, settings: dict[str, Any]) -> None:
    """LoRA, full fine-tuning, or training from random weights; NTPS after LoRA for the first seed."""
    import from_scratch
    import lora_finetuning

    num_steps = NUM_STEPS[kind]
    settings = {**settings, **FINETUNING, "num_steps": num_steps, "steps_per_evaluation": num_steps}
    if kind == "lora":
        lora_finetuning.main(with_values(lora_finetuning.Config(), **settings, ntps_after=settings["seed"] == 0))
    else:
        init = "pretrained" if kind == "full_finetuning" else "random"
        from_scratch.main(with_values(from_scratch.Config(), **settings, init=init, save_model=False))


def run_cell(cell: Cell, log_path: Path) -> str | None:
    """Runs a cell with its output in a file; returns what went wrong, None if nothing did."""
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with open(log_path, "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            cell.run()
        except UserError as error:
            return str(error)
        except Exception as error:  # one odd cell must not end a long run; the log has the traceback
            traceback.print_exc()
            return f"{type(error).__name__}: {error}"
    return None


# ------------------------------------------------------------------ the plan
def cells_of(rung: Rung, root: Path) -> Iterable[tuple[int, Cell]]:
    """The cells of one model, each with its turn: closed forms of all models first, further seeds last."""
    model = Path(rung.name).name
    pretrained = (f"pretrain-{model}",) if rung.pretraining else ()
    for seed in range(rung.num_seeds):
        first_turn = 0 if seed == 0 else 1 + max(TURNS.values())
        for task in PROBED_TASKS if seed == 0 else TRAINED_TASKS:
            settings = {"model_name": rung.name, "dataset_name": f"docstrings/{task}", "seed": seed}
            settings |= {"max_samples": MAX_SAMPLES, "results_dir": root / f"seed{seed}"}
            name = f"{model}-{task}-seed{seed}"
            closed = Cell(f"closed-form-{name}", partial(closed_form, settings), pretrained)
            yield first_turn + TURNS["closed-form"], closed
            if task not in TRAINED_TASKS:
                continue
            probe = Cell(f"probe-{name}", partial(linear_probe, settings), (*pretrained, closed.name))
            yield first_turn + TURNS["probe"], probe
            for kind in rung.kinds(seed):
                cell = Cell(f"{kind}-{name}", partial(finetune, kind, settings), (*pretrained, probe.name))
                yield first_turn + TURNS[kind], cell


def plan(config: Config) -> list[Cell]:
    """Every cell in the order of its turn; what a cell needs may come later only by waiting."""
    ladder = LADDER if config.scale == "full" else QUICK_LADDER
    pretraining = [
        Cell(f"pretrain-{Path(rung.name).name}", partial(pretrain, rung, config.compile))
        for rung in reversed(ladder)  # the longest first
        if rung.pretraining
    ]
    turns = [turn for rung in ladder for turn in cells_of(rung, config.results_dir / config.scale)]
    return pretraining + [cell for _, cell in sorted(turns, key=lambda turn: turn[0])]


def ready(cell: Cell, done: dict[str, str | None]) -> bool:
    """Whether all that the cell needs has run, well or not."""
    return all(name in done for name in cell.needs)


def run_cells(cells: list[Cell], num_workers: int, logs: Path) -> dict[str, str | None]:
    """Runs all cells, `num_workers` at a time; returns for each what went wrong, None where nothing did."""
    os.environ["OMP_NUM_THREADS"] = "1"  # inherited: small models are fastest on one thread each
    waiting, done, running = list(cells), dict[str, str | None](), dict[Future, Cell]()
    with (
        ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool,
        tqdm(total=len(cells), unit="cell", desc="study", smoothing=0) as progress,
    ):
        while waiting or running:
            for cell in [cell for cell in waiting if ready(cell, done)][: num_workers - len(running)]:
                waiting.remove(cell)
                if failed := [name for name in cell.needs if done[name]]:
                    done[cell.name] = f"needs {failed[0]}"
                    progress.update()
                else:
                    running[pool.submit(run_cell, cell, logs / f"{cell.name}.log")] = cell
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell = running.pop(future)
                done[cell.name] = future.result()
                progress.update()
                progress.set_postfix_str(cell.name, refresh=False)
    return done


# ------------------------------------------------------------------ run
def main(config: Config) -> None:
    """Runs every cell that is not there yet.

    Raises:
        UserError: naming the cells that failed, or a worker was killed.
    """
    root = config.results_dir / config.scale
    try:
        done = run_cells(plan(config), config.num_workers, root / "logs")
    except BrokenProcessPool:
        raise UserError(
            "A worker was killed, perhaps for memory. The finished cells are kept: run the same command again, "
            f"with fewer --num_workers than {config.num_workers} if it happens again."
        ) from None
    failures = [f"{name}: {error}" for name, error in done.items() if error]
    if failures:
        lines = "\n  ".join(failures)
        raise UserError(f"{len(failures)} of {len(done)} cells failed, see {root / 'logs'}:\n  {lines}")
    print(root)


if __name__ == "__main__":
    run_script(main, Config, __doc__)
