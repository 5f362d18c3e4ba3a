"""The Python tests that take seconds, for continuous integration: every test below weights_tools but those of SLOW. Needs what
requirements.txt names. What is left out is said in a SKIP line of its own.

    python -m weights_tools.quick_tests
"""
import sys
import unittest
from pathlib import Path

SLOW = {
    "weights_tools.train.test_stages.Stages": "trains every stage on toy data; python -m unittest weights_tools.train.test_stages",
    "weights_tools.train.test_fsdp.Sharded": "trains in several processes; python -m unittest weights_tools.train.test_fsdp",
}


def cases(suite):
    for test in suite:
        if isinstance(test, unittest.TestSuite):
            yield from cases(test)
        else:
            yield test


def main():
    root = Path(__file__).parent
    names = sorted(".".join(("weights_tools", *path.relative_to(root).with_suffix("").parts)) for path in root.rglob("test_*.py"))
    quick, left_out = unittest.TestSuite(), set()
    for test in cases(unittest.defaultTestLoader.loadTestsFromNames(names)):
        owner = test.id().rpartition(".")[0]
        if owner in SLOW:
            left_out.add(owner)
        else:
            quick.addTest(test)
    result = unittest.TextTestRunner(verbosity=1).run(quick)
    for owner, why in SLOW.items():
        print(f"SKIP: {owner}: {why}" if owner in left_out else f"{owner}: no such tests, but quick_tests.py names them")
    return 0 if result.wasSuccessful() and left_out == set(SLOW) else 1


if __name__ == "__main__":
    sys.exit(main())
