"""Quantisation: keys and values as packed bytes and back. Knows bytes and no cache."""

from smartkv.quantization.affine import dequantize, quantize
from smartkv.quantization.codecs import SCHEMES

__all__ = ["SCHEMES", "dequantize", "quantize"]
