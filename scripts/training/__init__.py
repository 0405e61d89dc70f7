"""Losses, training steps, handlers and checkpoints."""
