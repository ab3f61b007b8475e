"""`python -m smartbird`: the command line."""

import sys

from smartbird.cli import main

sys.exit(main())
