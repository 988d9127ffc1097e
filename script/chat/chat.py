"""The tutorial's door: python chat.py --model_name_or_path M [--adapter_name_or_path A] [--template_name T]"""

import sys

from firefly.cli import run

if __name__ == "__main__":
    run(["chat", *sys.argv[1:]])
