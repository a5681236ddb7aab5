"""`python -m spul`, also under `accelerate launch -m spul`."""

import sys

from .commands.main import main

if __name__ == "__main__":
    sys.exit(main())
