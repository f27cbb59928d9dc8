"""Triton kernels: sweeps over all pairs, and steps over vectors. They hold no loop of their own and no schedule. Imported as `gpu_ot.kernels`."""

if __name__ == "kernels":
    raise ImportError("this folder is the package gpu_ot.kernels; import it by that name (another project owns the name `kernels`)")
