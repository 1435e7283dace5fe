"""Kernels of gfx942 and gfx950: attention in Gluon, AITER's ragged rows. Importing a module here imports triton."""
