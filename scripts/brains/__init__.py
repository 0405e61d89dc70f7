"""Random heads with tumours, drawn anew for every seed, to train on without patients."""
