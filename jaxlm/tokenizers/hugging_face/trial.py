"""A program that loads a tokenizer.json and encodes texts, within limits.

Run as a child by `limits` for files with a pattern that may take forever to match: the
library does not stop for Ctrl-C. It imports neither jaxlm nor JAX.

Reads {"tokenizer": ..., "texts": [...], "seconds": ..., "bytes": ...} from stdin and
writes {} or {"error": ...} to stdout, both JSON. The arguments are folders to import
from. On macOS the memory limit is not enforced.
"""

import json
import os
import resource
import sys


def main() -> None:
    """Tries the tokenizer on stdin and writes the answer to stdout."""
    sys.path.extend(sys.argv[1:])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    job = json.loads(sys.stdin.buffer.read())
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (job["seconds"], job["seconds"] + 1))
    if sys.platform != "darwin":
        resource.setrlimit(resource.RLIMIT_AS, (job["bytes"], job["bytes"]))
    import tokenizers

    answer = {}
    try:
        library = tokenizers.Tokenizer.from_str(job["tokenizer"])
        for text in job["texts"]:
            library.encode(text, add_special_tokens=False)
    except BaseException as error:  # A panic of the library is a BaseException.
        answer = {"error": f"fails: {' '.join(str(error)[:300].split())}"}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
