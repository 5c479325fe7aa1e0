"""`python -m benchmarks.embed`. The contest is in `run`: worker processes import it by that name."""

import sys

from benchmarks.embed.run import main

if __name__ == "__main__":
    sys.exit(main())
