"""Fuzzes targets and prints what is wrong, and the counts."""

import argparse
import sys
from collections import Counter

from tests.fuzz import targets
from tests.fuzz.frame import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", help=f"of {', '.join(targets.ALL)}; default: all")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    wrong = 0
    for name in options.targets or targets.ALL:
        counts: Counter[str] = Counter()
        for finding in fuzz(name, options.cases, options.seed, counts):
            wrong += 1
            print(f"{finding.target} {finding.case}: {finding.kind}: {finding.detail}")
            print(f"    {finding.shown[:600]!r}")
        print(f"| {name} | {counts.total()} | {dict(counts)} |", flush=True)
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main())
