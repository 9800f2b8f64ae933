"""Measure how exports are planned and written.

    python -m benchmarks.export planning
    python -m benchmarks.export stream --gb 0.25
    python -m benchmarks.export live --gb 0.25
    python -m benchmarks.export rows
    python -m benchmarks.export layers

Each verb answers one question and prints Markdown.
"""

import argparse

from benchmarks import layers, live, planning, rows, streaming


def main() -> None:
    """Measure what the verb says, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb in (planning, streaming, live, rows, layers):
        verb.add_parser(verbs)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
