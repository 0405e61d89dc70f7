"""Parts of the networks: U-Nets, conditioning modules, grading head, baselines."""
