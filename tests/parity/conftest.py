"""Comparisons with a running transformers; elsewhere they are not collected.

The goldens hold the same results and are compared everywhere.
"""

from importlib.util import find_spec

if not (find_spec("torch") and find_spec("transformers")):
    collect_ignore_glob = ["*_live.py"]
