"""Collects the tests that run transformers only where it is installed.

The goldens contain the same results, and are compared everywhere.
"""

from importlib.util import find_spec

if not (find_spec("torch") and find_spec("transformers")):
    collect_ignore_glob = ["*_live.py"]
