"""How kernels are launched: on the device of their tensors, compiled for as few cases as serve, and the same by every Triton."""

import contextlib

import torch
from torch import Tensor

#: Triton compiles a kernel anew for an integer that is 1, and for multiples of 16. For these it is told not to: sizes, and strides of
#: vectors, from which no code gets faster. (What is left are the rows of stored points, which always are multiples of 16.)
COUNTS = (
    *("n", "m", "d", "batch", "splits", "blocks", "parts", "per_part", "columns", "width", "iterations", "plain", "known"),
    *("a_stride", "b_stride", "C_stride", "logs_stride", "last_stride", "batch_stride", "row_stride"),
)
#: Products and sums may become one operation. Said here, since Triton's own choice changes with its version, and numbers with it.
FUSED = {"enable_fp_fusion": True}


def on_device_of(x: Tensor):
    """Triton launches on the current device, which need not be the one that holds the data."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
