"""The plumbing of the scripts. Importing it first of all sets what libraries read once, when they are loaded."""

import os
import sys
from types import TracebackType


def quiet_interrupt(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    """Shows what ends the program: one line for Ctrl-C, which may come while libraries are loaded."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


sys.excepthook = quiet_interrupt

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: on a busy machine spinning costs tenfold
os.environ.setdefault("SCIPY_ARRAY_API", "1")  # lets scikit-learn work on the GPU
if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # of many processes the first shows how far all are
