"""``python -m kdvit``."""

import sys

from kdvit.cli import main

sys.exit(main())
