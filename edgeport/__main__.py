"""`python -m edgeport`."""

from __future__ import annotations

import sys

from edgeport.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
