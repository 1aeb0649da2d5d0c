"""From the CUDA sources to kernels that can be launched."""
