"""Train a language model: python train.py [CONFIG] [--section.field value ...]

The same as `jaxlm train`; the code is in `jaxlm/commands/train.py`.
"""

import sys

from jaxlm.cli import run, start

if __name__ == "__main__":
    start(trains=True)
    names = {"prog": "python train.py", "sample_command": "python sample.py"}
    sys.exit(run("train", sys.argv[1:], **names))
