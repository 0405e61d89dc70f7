"""Sample masks of whole volumes."""
