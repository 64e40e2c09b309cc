"""Score predictions, for every script that fits a probe or a head."""

import numpy as np


def classification_scores(labels: np.ndarray, probabilities: np.ndarray) -> dict[str, float | None]:
    """Accuracy, balanced accuracy of the classes present, macro-F1, log-loss; labels (n,), probabilities (n, c)."""
    from sklearn.metrics import accuracy_score, f1_score, log_loss, recall_score

    probabilities = probabilities.astype(np.float64)
    probabilities /= probabilities.sum(1, keepdims=True)
    predicted, present = probabilities.argmax(1), np.unique(labels)
    return {
        "accuracy": float(accuracy_score(labels, predicted)),
        "balanced_accuracy": float(recall_score(labels, predicted, labels=present, average="macro", zero_division=0)),
        "macro_f1": float(f1_score(labels, predicted, average="macro", zero_division=0)),
        "log_loss": float(log_loss(labels, probabilities, labels=np.arange(probabilities.shape[1]))),
    }


def squared_error_scores(targets: np.ndarray, predictions: np.ndarray) -> dict[str, float | None]:
    """Mean squared error of (n, c), error / variance of the targets, and R2; the last two None for equal targets."""
    error = float(np.square(targets - predictions).mean())
    constant = bool((targets == targets[:1]).all())  # its computed variance may be a rounding error
    share = None if constant else error / float(targets.var(0).mean())
    return {"mse": error, "mse_over_variance": share, "r2": None if share is None else 1 - share}


def regression_scores(targets: np.ndarray, predictions: np.ndarray) -> dict[str, float | None]:
    """The scores of `squared_error_scores` and the Pearson correlation (None if either is constant) of (n,)."""
    # a constant has a spread by rounding alone, small beside its own size
    varies = all(values.std() > 1e-12 * np.abs(values).max() for values in (targets, predictions))
    pearson = float(np.corrcoef(targets, predictions)[0, 1]) if varies else None
    return {**squared_error_scores(targets[:, None], predictions[:, None]), "pearson": pearson}
