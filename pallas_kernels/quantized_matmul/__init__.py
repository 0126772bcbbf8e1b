"""Products with weights of 8 or 4 bits."""

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.formats import (
    FORMS,
    TILE_OUTPUTS,
    QuantizedWeight,
    dequantize,
    quantize,
    storage,
)

__all__ = ["FORMS", "TILE_OUTPUTS", "QuantizedWeight", "dequantize", "quantize", "quantized_matmul", "storage"]
