"""Optional kernels, C for CPUs and Triton for GPUs; tests hold each equal to the plain formula."""
