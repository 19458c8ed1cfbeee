"""One thread per test process: the suite runs in parallel, and tiny tensors only lose by sharing them."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, here and in the commands that tests start
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
