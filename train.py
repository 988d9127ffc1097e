"""The tutorial's door: python train.py --train_args_file CONFIG, or the same through torchrun."""

import sys

from firefly.cli import run

if __name__ == "__main__":
    run(["train", *sys.argv[1:]])
