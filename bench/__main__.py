"""`python -m bench`: report, compare, counts, scale."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    report = commands.add_parser("report", help="tables and pictures of results, into docs/benchmarks.md")
    report.add_argument("results", nargs="*", type=Path, default=[Path(".benchmarks/results.json")])
    report.add_argument("--docs", type=Path, default=Path("docs"))
    compare = commands.add_parser("compare", help="two commits compared; fails on a slowdown beyond the noise")
    compare.add_argument("base")
    compare.add_argument("head")
    compare.add_argument("--minutes", type=float, default=10, help="time limit, builds excluded")
    compare.add_argument("--out", type=Path, default=Path(".benchmarks/compare"), help="where JSON and report go")
    counts = commands.add_parser("counts", help="instructions and system calls, compared with the recorded ones")
    counts.add_argument("--record", action="store_true")
    scale = commands.add_parser("scale", help="sizes from a thousand to ten or fifty million keys")
    scale.add_argument("--largest", type=int, default=10_000_000)
    scale.add_argument("--directory", type=Path, default=Path(".benchmarks"), help="70 free bytes per key")
    scale.add_argument("--results", type=Path, default=Path(".benchmarks/scale.json"))
    options = parser.parse_args()
    # Imported late: `compare` and `counts` run in an environment without matplotlib.
    if options.command == "report":
        from bench.report import write_report  # noqa: PLC0415

        return write_report(options.results, options.docs)
    if options.command == "compare":
        from bench.compare import compare as compare_commits  # noqa: PLC0415

        return compare_commits(options.base, options.head, options.minutes, options.out)
    if options.command == "counts":
        from bench import counts as counting  # noqa: PLC0415

        return counting.main(options.record)
    from bench.scale import measure_scale  # noqa: PLC0415

    return measure_scale(options.largest, options.directory, options.results)


if __name__ == "__main__":
    sys.exit(main())
