"""Triton kernels. They know no algorithm: no weights, no penalties, no schedules. Imported as `gpu_ot.kernels`."""

if __name__ == "kernels":
    raise ImportError("this folder is the package gpu_ot.kernels; import it by that name (another project owns the name `kernels`)")
