"""``python -m apot_fx``: the command ``apot-fx``."""

import sys

from .cli import main

sys.exit(main())
