"""The plumbing of the scripts. Importing it first of all sets what libraries read once, when they are loaded."""

import os

# Settings decide, not the environment: accelerate would take bfloat16, compilation or accumulation of gradients from
# these, torch and oneDNN a lower precision of float32 products.
for name in [*os.environ]:
    if name.startswith("ACCELERATE_") or name in ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE"):
        del os.environ[name]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it reports each weight that a base model leaves out
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # idle threads sleep: on a busy machine spinning costs tenfold
os.environ.setdefault("SCIPY_ARRAY_API", "1")  # lets scikit-learn work on the GPU
if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # of many processes the first shows how far all are
