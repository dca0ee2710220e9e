"""`python -m prunectl`, the same as `prunectl`."""

import sys

from prunectl.cli import main

sys.exit(main())
