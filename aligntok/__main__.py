"""`python -m aligntok` is the `aligntok` command."""

import sys

from aligntok.cli import main

sys.exit(main())
