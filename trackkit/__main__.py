"""`python -m trackkit` is the command line."""

import sys

from trackkit.cli import main

sys.exit(main())
