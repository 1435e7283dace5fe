"""A step of a server: its metadata, its paths, the entry point called once a layer."""
