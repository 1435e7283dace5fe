"""Gluon kernels of sm_90. Importing a module here imports triton."""
