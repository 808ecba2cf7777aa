"""Caches: all `transformers.Cache` classes and their attention; how long a key lives is decided in `policies`."""

from smartkv.cache.adaptive_cache import AdaptiveCache
from smartkv.cache.lifespan_cache import LifespanCache
from smartkv.cache.quantized_cache import QuantizedCache
from smartkv.cache.serialization import load_cache, save_cache

__all__ = ["AdaptiveCache", "LifespanCache", "QuantizedCache", "load_cache", "save_cache"]
