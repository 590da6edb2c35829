"""`python -m finback`: the command line."""

from finback.cli import main

if __name__ == "__main__":
    main()
