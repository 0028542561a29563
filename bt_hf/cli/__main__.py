"""`python -m bt_hf.cli`, and `accelerate launch -m bt_hf.cli`: the same as `bt-hf`."""

import sys

from bt_hf.cli import main

sys.exit(main())
