"""The tutorial's door: python chat.py --model_name_or_path M [--adapter_name_or_path A] [--template_name T]"""

import sys

from firefly.cli import main

if __name__ == "__main__":
    sys.exit(main(["chat", *sys.argv[1:]]))
