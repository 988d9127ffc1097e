"""What a model is worth: its loss on held-out rows, its answers, and how both differ from another model's."""
