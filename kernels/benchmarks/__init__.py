"""What the kernels take on one GPU, beside their peers and the ceilings of the chip."""
