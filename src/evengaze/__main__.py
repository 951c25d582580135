"""`python -m evengaze`, for launchers that start modules (torchrun, accelerate)."""

from evengaze.cli import main

main()
