"""Products with weights, of 8 or 4 bits or as they are: one, or all of a layer's input stage."""

from pallas_kernels.quantized_matmul.api import project, quantized_matmul
from pallas_kernels.quantized_matmul.calibrated import quantize_calibrated
from pallas_kernels.quantized_matmul.deferred import Moments
from pallas_kernels.quantized_matmul.formats import (
    FORMS,
    TILE_OUTPUTS,
    QuantizedWeight,
    dequantize,
    output_rows,
    quantize,
    storage,
)
from pallas_kernels.quantized_matmul.product import MAX_ROWS, SIDE, Product, in_eights, reason_against
from pallas_kernels.quantized_matmul.reference import exact_gelu
from pallas_kernels.quantized_matmul.sharded import size_of

__all__ = [
    "FORMS",
    "MAX_ROWS",
    "SIDE",
    "TILE_OUTPUTS",
    "Moments",
    "Product",
    "QuantizedWeight",
    "dequantize",
    "exact_gelu",
    "in_eights",
    "output_rows",
    "project",
    "quantize",
    "quantize_calibrated",
    "quantized_matmul",
    "reason_against",
    "size_of",
    "storage",
]
