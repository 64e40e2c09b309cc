"""The solvers behind linear_sklearn.py: a good start for scikit-learn's logistic regression, and ridge from moments."""

import os
import warnings
from typing import Any

import joblib
import numpy as np
import sklearn
import torch
from scipy.optimize import minimize
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from utils.script import UserError

SMALL_JOB = 5e8  # layers * n * d * c below which starting processes takes longer than the fits


def as_array(features: Tensor) -> Any:
    """What scikit-learn is given: numpy, or the tensor itself where it stays on its device (array API dispatch)."""
    return features if sklearn.get_config()["array_api_dispatch"] else features.numpy()


# ------------------------------------------------------------------ logistic regression
def preconditioned_start(features: Tensor, labels: Tensor, num_classes: int, inverse_penalty: float) -> Tensor:
    """Weights and intercepts close to the optimum of softmax regression: a start from which lbfgs has little to do.

    The same objective, minimised by L-BFGS in the coordinates V of W = D V L^-1, with L L' = X'X/n + penalty and D
    diagonal: there the Hessian is near the identity, whatever the correlations between the features.

    Args:
        features: X, (n, d), standardised, float32 or float64.
        labels: classes 0..c-1, (n,).
        num_classes: c.
        inverse_penalty: scikit-learn's C.

    Returns:
        (c, d + 1), float64, the intercept last.
    """
    n, d = features.shape
    penalty = 1 / (inverse_penalty * n)
    one_hot = torch.nn.functional.one_hot(labels, num_classes).T.to(features.dtype).contiguous()
    shares = one_hot.mean(1).double()
    curvature = shares * (1 - shares) / 2  # of the loss in a class's logit, halfway from a start at zero to a good fit
    unit = curvature.rsqrt()[:, None]
    second_moment = (features.T @ features).double() / n
    jitter = penalty / curvature.mean() + torch.finfo(features.dtype).eps * d  # the trace is d
    factor = torch.linalg.cholesky(second_moment + jitter * torch.eye(d, device=features.device).double())

    def to_weights(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        scaled = torch.from_numpy(flat).to(features.device).view(num_classes, d + 1) * unit
        return torch.linalg.solve_triangular(factor, scaled[:, :d], upper=False, left=False), scaled[:, d:]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercept = to_weights(flat)
        # classes first: on the CPU (c, n) (n, d) takes a fifth of the time of (d, n) (n, c) where c is small
        logits = weights.to(features.dtype) @ features.T + intercept.to(features.dtype)
        log_shares = logits.log_softmax(0)
        loss = -(log_shares * one_hot).sum(0).double().mean() + penalty / 2 * weights.square().sum()
        residual = (log_shares.exp() - one_hot) / n
        gradient = (residual @ features).double() + penalty * weights
        gradient = torch.linalg.solve_triangular(factor.T, gradient, upper=True, left=False)
        gradient = torch.cat([gradient, residual.sum(1, dtype=torch.float64)[:, None]], dim=1) * unit
        return loss.item(), gradient.flatten().cpu().numpy()

    options = {"gtol": 5e-4, "maxiter": 200}  # mostly within scikit-learn's own tolerance
    found = minimize(loss_and_gradient, np.zeros(num_classes * (d + 1)), method="L-BFGS-B", jac=True, options=options)
    start = torch.cat(to_weights(found.x), dim=1)
    return (start - start.mean(0)).cpu()


def fit_logistic(features: Tensor, labels: np.ndarray, config: Any) -> tuple[LogisticRegression, dict]:
    """scikit-learn's logistic regression and how its solver ended; lbfgs starts at `preconditioned_start`.

    Where rounding of float32 features stops lbfgs early, the fit goes on in float64.

    Args:
        features: (n, d), standardised, float32; see `as_array` for who does the work.
        labels: classes 0..c-1 of which none is absent, (n,).
        config: `solver`, `inverse_penalty`, `max_iter`, `tolerance` and `data.seed` are read.

    Returns:
        The fitted model; {"num_iterations", "converged"}, the iterations those of scikit-learn after the start.
    """
    lbfgs = config.solver == "lbfgs"
    max_iter = config.max_iter or (10_000 if lbfgs else 1000)
    tolerance = config.tolerance or (1e-4 if lbfgs else 0.01)
    model = LogisticRegression(
        solver=config.solver, C=config.inverse_penalty, max_iter=max_iter, tol=tolerance, random_state=config.data.seed
    )
    if lbfgs:
        binary = labels.max() == 1  # scikit-learn then fits one logit: half the penalty of two opposite ones
        penalty, targets = config.inverse_penalty / (2 if binary else 1), torch.from_numpy(labels).to(features.device)
        start = preconditioned_start(features, targets, int(labels.max()) + 1, penalty).numpy().astype(np.float32)
        start = start[1:] - start[:1] if binary else start
        model.warm_start, model.coef_, model.intercept_ = True, start[:, :-1].copy(), start[:, -1].copy()
    num_iterations = 0
    for dtype in (features.dtype, torch.float64):
        matrix = features.to(dtype)
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(as_array(matrix), labels)
        num_iterations += int(model.n_iter_[0])
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)
        if converged or not lbfgs or num_iterations >= max_iter:
            break
    return model, {"num_iterations": num_iterations, "converged": converged}


# ------------------------------------------------------------------ memory
def num_processes(asked: int | None, memory_gb: float | None, num_layers: int, rows: tuple[int, int], width: int,
                  num_classes: int) -> int:  # fmt: skip
    """Processes that fit layers at the same time: as many as cores, layers and memory allow, one for a small job.

    Args:
        asked: upper limit; None: the cores.
        memory_gb: limit of all processes; None: half of the machine's memory.
        num_layers: layers to fit.
        rows: texts of train and of test.
        width: features d.
        num_classes: c.

    Raises:
        UserError: a single layer does not fit the memory.
    """
    num_train, num_texts = rows[0], sum(rows)
    limit = memory_gb or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30 / 2
    # float32 features, those of train also widened to float64; logits and their like; d x d matrices in float64
    needed = 4 * num_texts * width + 8 * num_train * width + 40 * num_texts * num_classes + 64 * width**2
    if needed / 2**30 > limit:
        raise UserError(
            f"One layer of {num_texts:,} texts and {width} features needs {needed / 2**30:.2g} GB, the limit is "
            f"{limit:.2g}. Raise --memory_gb, or take fewer texts with --max_samples."
        )
    if asked is None and num_layers * num_train * width * num_classes < SMALL_JOB:
        return 1
    return min(asked or joblib.cpu_count(), num_layers, int(limit * 2**30 / needed))
