"""Adversarial training of a network that makes images: discriminators, their losses, the training step, diagnostics."""
