"""The tutorial's door: python script/merge_lora.py --model_name_or_path B --adapter_name_or_path A --save_path S"""

import sys

from firefly.cli import run

if __name__ == "__main__":
    run(["merge", *sys.argv[1:]])
