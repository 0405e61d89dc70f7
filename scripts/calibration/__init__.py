"""Calibration: all that is fitted to validation subjects after training, and saved in the checkpoint."""
