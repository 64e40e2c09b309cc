"""The plumbing of the scripts. Import it first: it sets environment variables that libraries read when they load."""

import os

# Settings decide, not the environment: these variables would switch on bfloat16, compilation or accumulation of
# gradients in accelerate, and a lower precision of float32 products in torch and oneDNN.
for name in [*os.environ]:
    if name.startswith("ACCELERATE_") or name in ("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "ONEDNN_DEFAULT_FPMATH_MODE"):
        del os.environ[name]
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # else it reports each weight that a base model leaves out
# idle threads wait a tenth of a millisecond, then sleep: longer slows down a busy machine, shorter small matrices
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # tensors of 2 MiB and more on huge pages: fewer page faults
os.environ.setdefault("SCIPY_ARRAY_API", "1")  # lets scikit-learn work on the GPU
if os.environ.get("RANK", "0") != "0":
    os.environ.setdefault("TQDM_DISABLE", "1")  # among several processes only the first shows progress
