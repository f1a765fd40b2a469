"""Continue a text: python sample.py [RUN] --prompt ... (else the newest run)

The same as `jaxlm sample`; the code is in `jaxlm/commands/sample.py`.
"""

import sys

from jaxlm.cli import run, start

if __name__ == "__main__":
    start(trains=False)
    sys.exit(run("sample", sys.argv[1:], "python sample.py"))
