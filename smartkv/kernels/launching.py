"""What all kernels share: Triton itself, and the sizes of what a program reads at once."""

from smartkv.errors import SmartKVError

try:
    import triton
    import triton.language as tl
except ImportError as error:
    raise SmartKVError(
        "smartkv.kernels needs Triton, which comes with torch for CUDA: pip install 'smartkv[triton]'"
    ) from error

__all__ = ["BLOCKS", "interpreted", "padded", "tl", "triton"]

BLOCKS = {2: 64, 4: 32}  # slots that a program reads at once, by bytes of a number; more would spill registers
LEAST = 16  # rows and columns that tl.dot multiplies at least


def padded(size: int) -> int:
    """Return the power of 2, at least `LEAST`, to which a matrix is padded."""
    return max(LEAST, triton.next_power_of_2(size))


def interpreted() -> bool:
    """Say whether kernels run in Triton's interpreter, which multiplies the bits of bfloat16 like integers."""
    return bool(triton.knobs.runtime.interpret)
