"""The plumbing of the scripts. Importing it first of all sets what libraries read once, when they are loaded."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: on a busy machine spinning costs tenfold
os.environ.setdefault("SCIPY_ARRAY_API", "1")  # lets scikit-learn work on the GPU
