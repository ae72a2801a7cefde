"""``python -m shift_kernels``: see :mod:`shift_kernels.info`."""

import sys

from shift_kernels.info import main

if __name__ == "__main__":
    sys.exit(main())
