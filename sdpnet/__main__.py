"""`python -m sdpnet` is the command `sdpnet`."""

import sys

from sdpnet.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
