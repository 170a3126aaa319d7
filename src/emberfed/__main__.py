"""`python -m emberfed` is the same as `emberfed`."""

from emberfed.cli import main

if __name__ == "__main__":
    main()
