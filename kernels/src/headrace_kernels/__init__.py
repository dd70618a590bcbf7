"""headrace's native engine: runs a program of about ten instructions over quantized weights and a KV cache.

The interface and the program are described in docs/kernels.md.
"""

from headrace_kernels.engine import Engine
from headrace_kernels.library import Cancelled, ProgramError, SpanError, available_isas, known_isas

__all__ = ["Cancelled", "Engine", "ProgramError", "SpanError", "available_isas", "known_isas"]
__version__ = "0.2.0"
