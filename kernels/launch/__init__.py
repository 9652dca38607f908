"""How a Triton kernel is launched, and with which block sizes."""
