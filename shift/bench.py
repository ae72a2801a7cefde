"""``shift-bench``, also ``python -m shift.bench``: our kernels beside PyTorch's, on this machine."""

import sys

from shift_kernels.bench.compare import main

if __name__ == "__main__":
    sys.exit(main())
