"""How a configuration becomes a run: one module for each thing that is settled before the first step."""
