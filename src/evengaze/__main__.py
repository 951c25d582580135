"""`python -m evengaze` is the command `evengaze`."""

from evengaze.cli import main

if __name__ == "__main__":
    main()
