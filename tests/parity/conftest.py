"""The live comparison needs torch and transformers; elsewhere it is not collected.

The goldens hold the same results and are compared everywhere.
"""

from importlib.util import find_spec

collect_ignore = (
    [] if find_spec("torch") and find_spec("transformers") else ["test_live.py"]
)


def pytest_configure(config):
    config.addinivalue_line("markers", "parity: runs transformers beside jaxlm")
