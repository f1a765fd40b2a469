"""Continue a text: python sample.py [CHECKPOINT] --prompt ... (else the newest run)

The same as `jaxlm sample`; the code is in `jaxlm/commands/sample.py`.
"""

import sys

from jaxlm.cli import run

if __name__ == "__main__":
    sys.exit(run("sample", sys.argv[1:], "python sample.py"))
