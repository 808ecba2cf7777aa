"""Triton kernels for GPUs (`pip install 'smartkv[triton]'`), tested without one in Triton's interpreter."""
