"""A DSv4-shaped layer over a text, served in mixed batches and checked."""
