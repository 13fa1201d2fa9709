"""``python -m deployments``: the command line ``cosmos3``."""

import sys

from deployments.launch.cli import main

if __name__ == "__main__":
    sys.exit(main())
