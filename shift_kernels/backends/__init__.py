"""The backends, in the order in which ``auto`` asks them: the last one serves everything."""

from shift_kernels.backends.base import ATTENTION, LOOPED_BLOCK
from shift_kernels.backends.cpu import CPU
from shift_kernels.backends.cpu_attention import CPU_ATTENTION
from shift_kernels.backends.cuda import CUDA
from shift_kernels.backends.torch import TORCH, TORCH_ATTENTION
from shift_kernels.backends.torch_graph import TORCH_GRAPH
from shift_kernels.backends.triton.backend import TRITON, TRITON_ATTENTION

for _backend in (TORCH, TORCH_GRAPH, CPU, CUDA, TRITON):  # a registration goes before those that were there
    LOOPED_BLOCK.register(_backend)
for _attention in (TORCH_ATTENTION, CPU_ATTENTION, TRITON_ATTENTION):
    ATTENTION.register(_attention)

__all__ = ["ATTENTION", "LOOPED_BLOCK"]
