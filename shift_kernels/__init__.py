"""Kernels for a transformer block that is applied T times with the same weights.

Public names: BlockSpec, LoopedBlock, LoopedCache, looped_block, attention; explain, explain_attention,
backends, register.
"""

from shift_kernels.api import attention, looped_block
from shift_kernels.cache import LoopedCache
from shift_kernels.dispatch import backends, register
from shift_kernels.errors import BackendFallbackWarning, ShiftInputError, ShiftTypeError
from shift_kernels.explained import explain, explain_attention
from shift_kernels.module import LoopedBlock
from shift_kernels.spec import BlockSpec

__version__ = "0.1.0"

__all__ = [
    "BackendFallbackWarning",
    "BlockSpec",
    "LoopedBlock",
    "LoopedCache",
    "ShiftInputError",
    "ShiftTypeError",
    "attention",
    "backends",
    "explain",
    "explain_attention",
    "looped_block",
    "register",
]
