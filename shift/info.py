"""``shift-info``, also ``python -m shift.info``: what is installed here and which backends work."""

import sys

from shift_kernels.info import main

if __name__ == "__main__":
    sys.exit(main())
