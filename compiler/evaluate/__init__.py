"""What a model is worth: how well it predicts, how far it is from another, its live cache, its speed, its words.

Models are loaded by plain transformers, as any user of them would.
"""

from compiler.evaluate.answers import Answer, generate
from compiler.evaluate.live_cache import CacheSize, cache_size, kv_cache
from compiler.evaluate.loading import load_model, load_tokenizer
from compiler.evaluate.measure import Evaluation, evaluate_model
from compiler.evaluate.speed import Speed, compare_speed

__all__ = [
    "Answer",
    "CacheSize",
    "Evaluation",
    "Speed",
    "cache_size",
    "compare_speed",
    "evaluate_model",
    "generate",
    "kv_cache",
    "load_model",
    "load_tokenizer",
]
