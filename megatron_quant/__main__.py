"""``python -m megatron_quant``."""

import sys

from megatron_quant.cli.main import main

sys.exit(main())
