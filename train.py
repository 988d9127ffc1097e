"""The tutorial's door: python train.py --train_args_file CONFIG, or the same through torchrun."""

import sys

from firefly.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
