"""Products with weights of 8 or 4 bits."""

from pallas_kernels.quantized_matmul.api import quantized_matmul
from pallas_kernels.quantized_matmul.formats import FORMS, QuantizedWeight, dequantize, quantize, storage

__all__ = ["FORMS", "QuantizedWeight", "dequantize", "quantize", "quantized_matmul", "storage"]
