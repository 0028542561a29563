"""Run `bt-hf` as `python -m bt_hf.cli` or `accelerate launch -m bt_hf.cli`."""

import sys

from bt_hf.cli import main

sys.exit(main())
