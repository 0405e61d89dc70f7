"""The bundle's own code: only what MONAI, ignite, ITK and scikit-learn do not have."""
