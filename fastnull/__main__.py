"""`python -m fastnull`: the command line."""

import sys

from fastnull.cli.parser import main

if __name__ == "__main__":
    sys.exit(main())
