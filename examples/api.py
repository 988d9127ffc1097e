"""Check data, train an adapter, merge it and ask the merged model: api.py MODEL ROWS FOLDER."""

import sys
from pathlib import Path

from firefly import GenerationSettings, Generator, Message, ModelConfig, check_data, load_config, merge, train

model, rows, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
run_file = {"model_name_or_path": model, "train_file": rows, "output_dir": str(folder / "adapter")}
run_file |= {"train_mode": "lora", "template_name": "default", "learning_rate": 2e-4, "max_steps": 2}

checked = check_data(run_file)
assert checked.problem is None, checked.problem
print(len(checked.data.train), "examples")

adapter = train(load_config(run_file))
merged = merge(ModelConfig(), adapter, folder / "merged")
with Generator.load(ModelConfig(name_or_path=str(merged))) as generator:
    print(generator.answer([Message.of("user", "Who are you?")], GenerationSettings(max_new_tokens=16)))
