"""Triton kernels: sweeps over all pairs, and steps over vectors; no loop and no schedule. Imported as `gpu_ot.kernels`."""

if __name__ == "kernels":
    raise ImportError("this folder is the package gpu_ot.kernels; import it by that name (another project owns the name `kernels`)")
