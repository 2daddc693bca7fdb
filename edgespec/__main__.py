"""`python -m edgespec`, and the console script."""

from edgespec.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
