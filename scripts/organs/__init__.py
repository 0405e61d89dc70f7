"""Structures of a CT: what only the bundle ``bundles/organs`` needs."""
