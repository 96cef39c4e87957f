"""`python -m moegen` is the command `moegen`."""

from moegen.cli import main

if __name__ == "__main__":
    main()
