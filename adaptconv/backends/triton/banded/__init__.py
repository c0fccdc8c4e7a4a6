"""banded: large depthwise kernels through the tensor cores, as Toeplitz tiles along the long axis."""
