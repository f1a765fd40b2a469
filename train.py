"""Train a language model: python train.py [CONFIG_FILE] [--section.field value ...]

The same as `jaxlm train`; how it goes is read in `jaxlm/commands/train.py`.
"""

import sys

from jaxlm.cli import run
from jaxlm.commands.process import restart_with_malloc_options

if __name__ == "__main__":
    restart_with_malloc_options()
    sys.exit(run("train", sys.argv[1:], "python train.py"))
