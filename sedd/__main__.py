"""`python -m sedd` runs the command `sedd`."""

import sys

from sedd.cli import main

sys.exit(main())
