"""Portable Triton kernels, one concern a file, each with its launcher. Importing a module here imports triton."""
