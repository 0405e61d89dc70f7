"""Command-line tools and links to other software."""
