"""``python -m shift.landscape``: see :mod:`shift.landscape.cli`."""

import sys

from shift.landscape.cli import main

if __name__ == "__main__":
    sys.exit(main())
