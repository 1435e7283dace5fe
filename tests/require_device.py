"""Exit with a reason unless torch is a build for VENDOR and sees a device of it.

Usage: python tests/require_device.py cuda|rocm

GPU tests skip where there is no GPU; an environment that exists to run them must fail there instead.
"""

import sys


def missing(vendor: str) -> str | None:
    """Why this interpreter cannot run VENDOR's GPU tests, or None when it can."""
    try:
        import torch
    except Exception as error:  # a torch whose libraries do not load is as missing as none, and says why
        return f"import torch failed: {type(error).__name__}: {error}"
    built_for = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "the CPU"
    if built_for != vendor:
        return f"torch {torch.__version__} at {torch.__path__[0]} is built for {built_for}, not {vendor}"
    if not torch.cuda.is_available():  # the HIP build answers under the same name
        return f"torch {torch.__version__} is built for {vendor} but sees no device"
    return None


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in ("cuda", "rocm"):
        sys.exit(__doc__)
    if reason := missing(sys.argv[1]):
        sys.exit(f"{sys.argv[1]} tests cannot run: {reason}")


if __name__ == "__main__":
    main()
