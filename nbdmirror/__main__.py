"""`python -m nbdmirror`, and the console script."""

from __future__ import annotations

import sys

from nbdmirror.cli.main import run
from nbdmirror.launch import keep_stdio


def main() -> None:
    """Run the command line and exit with its status."""
    keep_stdio()
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
