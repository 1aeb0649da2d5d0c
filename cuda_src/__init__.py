"""The CUDA sources of epcomm's kernels, compiled at run time; this file lets installs find them."""
