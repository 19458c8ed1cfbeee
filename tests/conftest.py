"""One thread per test process: the suite runs in parallel, and tiny tensors only lose by sharing them. Triton's kernels run in
its interpreter, which needs no GPU; ``TRITON_INTERPRET=0`` runs them on one."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the commands that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton
