"""What a multiprocessor has, by architecture (CUDA programming guide, compute capabilities)."""

SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
"""Shared memory that a block may use, bytes."""
REGISTERS = 64 * 1024
"""Registers that the threads of a block share."""
