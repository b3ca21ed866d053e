"""``python -m blaq`` is the command ``blaq``."""

import sys

from .cli import main

sys.exit(main())
