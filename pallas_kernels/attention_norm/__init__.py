"""The output stage of a layer: products, residual and the norms that come next, in one."""

from pallas_kernels.attention_norm.api import attention_norm, attention_norm_deferred
from pallas_kernels.attention_norm.meeting import new_meeting
from pallas_kernels.attention_norm.reference import layer_norm

__all__ = ["attention_norm", "attention_norm_deferred", "layer_norm", "new_meeting"]
