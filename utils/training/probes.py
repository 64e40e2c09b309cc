"""Find a good start for scikit-learn's logistic regression, for linear_sklearn.py."""

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
