"""What a depth step does beside its scan, each in one compiled pass forward and one backward.

Composed of tensor operations, a norm, a gated sum, a gated unit or a short convolution reads and
writes its features ten to twenty times, and at the widths of small models that takes longer than
the products. The passes (float32 and float64 on the CPU, differentiable once) do each in one
compiled loop; those here take the products with them. ``kernels.plan`` says where they run.
"""
