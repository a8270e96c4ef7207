"""`python -m dacal_addon` is `dacal`."""

import sys

from .cli import main

sys.exit(main())
