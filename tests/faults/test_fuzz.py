"""Every parser, with files made at random: a few of them here, or for minutes.

`JAXLM_FUZZ_MINUTES=10 pytest -s tests/faults/test_fuzz.py -k gguf` goes on for ten
minutes, with other files each time, and prints how many there were.
"""

import os

import pytest
from fuzz_case import FuzzProcess, fuzzers

MINUTES = float(os.environ.get("JAXLM_FUZZ_MINUTES", 0))


@pytest.fixture(scope="module")
def process():
    process = FuzzProcess()
    yield process
    process.close()


@pytest.mark.parametrize("name", fuzzers())
def test_a_parser_reads_or_refuses(name, process):
    found = process.run(name, MINUTES)
    if MINUTES:
        print(
            f"\n{name}: {found['count']} values, {found['refused']} refused, at most "
            f"{found['slowest']:.2f} s each"
        )
    assert not found["failure"], found["failure"]
    # Otherwise the files are so damaged that nothing but the first check is tried.
    assert 0 < found["refused"] < found["count"]
