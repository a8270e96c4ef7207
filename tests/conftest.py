"""What must be settled before anything is imported."""

import os

import torch

# Read when triton is loaded, which torch may do at any time: without a GPU, its kernels run in its interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
