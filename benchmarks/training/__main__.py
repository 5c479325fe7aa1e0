"""`python -m benchmarks.training`. The contest is in `run`: worker processes import it by that name."""

import sys

from benchmarks.training.run import main

if __name__ == "__main__":
    sys.exit(main())
