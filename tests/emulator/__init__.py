"""Runs the CUDA kernels on the CPU: the very same .cu files, compiled by g++ with other headers.

include/ gives g++ the words of CUDA C++ and stands in for cuda_src/ptx. runtime.cpp makes an OS
thread of every block and a fiber of every CUDA thread, and lets them meet in an order drawn by lot;
copies.cpp does bulk copies as late as they may be done. `build` compiles and launches, `world` has
the ranks of a group in this process, `cases` holds all calls to the oracle, and `faults` has wrong
changes that must be noticed. order.h tells ThreadSanitizer who waited for whom.
"""
