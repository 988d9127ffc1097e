"""`python -m firefly`: the command line, where the console script is not on the path."""

from firefly.cli import run

if __name__ == "__main__":
    run()
