"""Triton kernels of fastdiff, installed as ``fastdiff.kernels``."""

if __name__ != "fastdiff.kernels":
    raise ImportError(
        f"kernels: must be imported as fastdiff.kernels, got {__name__}; "
        "install the package (pip install -e .) instead of importing from the checkout"
    )
