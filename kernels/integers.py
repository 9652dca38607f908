"""Integer arithmetic of sizes: how many blocks, and how wide a block."""


def cdiv(a: int, b: int) -> int:
    """a / b rounded up: how many blocks of b cover a."""
    return -(-a // b)


def power_of_two(n: int, least: int = 16) -> int:
    """The smallest power of two that is at least `n` and `least`: the edge of a block."""
    covering = 1 << (n - 1).bit_length()
    return max(least, covering)
