"""Firefly: from a base model and data to a trained, checked and served model."""

__version__ = "0.1.0"
