"""``python -m fxshare``: the command line."""

import sys

from fxshare.cli import main

if __name__ == "__main__":
    sys.exit(main())
