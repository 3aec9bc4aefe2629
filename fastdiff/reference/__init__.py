"""The maths of the field in plain PyTorch, to be read and to test the kernels against."""
