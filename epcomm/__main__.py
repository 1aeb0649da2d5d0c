"""``python -m epcomm``: see `epcomm.cli`."""

import sys

from epcomm.cli import main

if __name__ == "__main__":
    sys.exit(main())
