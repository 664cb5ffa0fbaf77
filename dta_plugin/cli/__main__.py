"""`python -m dta_plugin.cli` does what `dta` does."""

import sys

from dta_plugin.cli import main

sys.exit(main())
