"""Find, check, split, read and write the images of subjects."""
