"""The OpenAI interface over a generator: chat and text completions, models, health, metrics."""
