"""Gluon kernels of gfx942 and gfx950. Importing a module here imports triton."""
