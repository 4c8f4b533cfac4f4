"""What training does, from kernels."""
