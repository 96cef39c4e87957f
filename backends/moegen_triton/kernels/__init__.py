"""The Triton kernels of routed layers and what binds them to torch."""
