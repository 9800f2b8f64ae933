"""How exports are planned and written.

    python -m benchmarks.export planning

A verb a question; each prints Markdown.
"""

import argparse

from benchmarks import planning


def main() -> None:
    """Measure what the verb says, and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    planning.add_parser(verbs)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
