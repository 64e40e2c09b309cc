"""Fit scikit-learn's logistic regression from a good start, for linear_sklearn.py."""

import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(features: Tensor) -> Any:
    """The argument for scikit-learn: numpy, or with array API dispatch the tensor itself on its device."""
    import sklearn

    return features if sklearn.get_config()["array_api_dispatch"] else features.numpy()


def preconditioned_start(features: Tensor, labels: np.ndarray, inverse_penalty: float) -> np.ndarray:
    """Weights and intercepts (c, d + 1), intercept last, close to the optimum of softmax regression: a start for lbfgs.

    The same objective, minimised by L-BFGS in the coordinates V of W = D V L^-1, with L L' = X'X/n + penalty and D
    diagonal, which make the Hessian nearly the identity for any correlations between the features.
    """
    from scipy.optimize import minimize

    n, d = features.shape
    penalty = 1 / (inverse_penalty * n)
    classes = torch.from_numpy(labels).to(features.device)
    one_hot = torch.nn.functional.one_hot(classes).T.to(features.dtype).contiguous()
    shares = one_hot.mean(1).double()
    curvature = shares * (1 - shares) / 2  # of the loss in a logit, halfway from zero to a good fit
    unit = curvature.rsqrt()[:, None]
    second_moment = (features.T @ features).double() / n
    jitter = penalty / curvature.mean() + torch.finfo(features.dtype).eps * d  # the trace is d
    factor = torch.linalg.cholesky(second_moment + jitter * torch.eye(d, device=features.device).double())

    def to_weights(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        scaled = torch.from_numpy(flat).to(features.device).view(-1, d + 1) * unit
        return torch.linalg.solve_triangular(factor, scaled[:, :d], upper=False, left=False), scaled[:, d:]

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights, intercept = to_weights(flat)
        # classes first: on the CPU (c, n) (n, d) takes a fifth of the time of (d, n) (n, c) if c is small
        logits = weights.to(features.dtype) @ features.T + intercept.to(features.dtype)
        log_shares = logits.log_softmax(0)
        loss = -(log_shares * one_hot).sum(0).double().mean() + penalty / 2 * weights.square().sum()
        residual = (log_shares.exp() - one_hot) / n
        gradient = (residual @ features).double() + penalty * weights
        gradient = torch.linalg.solve_triangular(factor.T, gradient, upper=True, left=False)
        gradient = torch.cat([gradient, residual.sum(1, dtype=torch.float64)[:, None]], dim=1) * unit
        return loss.item(), gradient.flatten().cpu().numpy()

    options = {"gtol": 5e-4, "maxiter": 200}  # mostly within scikit-learn's own tolerance
    found = minimize(loss_and_gradient, np.zeros(len(one_hot) * (d + 1)), method="L-BFGS-B", jac=True, options=options)
    start = torch.cat(to_weights(found.x), dim=1)
    return (start - start.mean(0)).cpu().numpy().astype(np.float32)


def fit_logistic(features: Tensor, labels: np.ndarray, solver: str, inverse_penalty: float, max_iter: int,
                 tolerance: float, seed: int) -> tuple[Any, dict]:  # fmt: skip
    """A fitted LogisticRegression, and {"num_iterations", "converged"} with the iterations of scikit-learn.

    lbfgs starts at `preconditioned_start`; if rounding of float32 features stops it early, it continues in float64.
    `features` (n, d) are standardised, float32; each of the classes 0..c-1 has a text in `labels` (n,).
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(solver=solver, C=inverse_penalty, max_iter=max_iter, tol=tolerance, random_state=seed)
    if solver == "lbfgs":
        binary = labels.max() == 1  # scikit-learn then fits one logit: half the penalty of two opposite ones
        start = preconditioned_start(features, labels, inverse_penalty / (2 if binary else 1))
        start = start[1:] - start[:1] if binary else start
        model.warm_start, model.coef_, model.intercept_ = True, start[:, :-1].copy(), start[:, -1].copy()
    num_iterations = 0
    for dtype in (features.dtype, torch.float64):
        with warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always", ConvergenceWarning)
            model.fit(as_array(features.to(dtype)), labels)
        num_iterations += int(model.n_iter_[0])
        converged = not any(issubclass(warning.category, ConvergenceWarning) for warning in raised)
        if converged or solver != "lbfgs" or num_iterations >= max_iter:
            break
    return model, {"num_iterations": num_iterations, "converged": converged}
