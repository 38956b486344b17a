"""`python -m sedd` is the command `sedd`."""

import sys

from sedd.cli import main

sys.exit(main())
