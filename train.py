"""Train a language model: python train.py [CONFIG_FILE] [--section.field value ...]

The same as `jaxlm train`; the code is in `jaxlm/commands/train.py`.
"""

import sys

from jaxlm.cli import run
from jaxlm.commands.process import restart_with_malloc_options

if __name__ == "__main__":
    restart_with_malloc_options()
    names = {"prog": "python train.py", "sample_command": "python sample.py"}
    sys.exit(run("train", sys.argv[1:], **names))
