"""``python -m retinanet``: the command line."""

import sys

from retinanet.cli import main

if __name__ == "__main__":
    sys.exit(main())
