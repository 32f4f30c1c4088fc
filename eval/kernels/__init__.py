"""The kernel benchmark: sparse and quantised attention against dense. ``python -m dit_accel.eval.kernels``

Needs torch alone (and Triton on a GPU), no diffusers.
"""
