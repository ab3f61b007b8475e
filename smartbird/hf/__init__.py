"""Pretrained Hugging Face models whose attention samples its keys: the extra ``smartbird[hf]``.

:func:`convert` changes a model in place and :func:`revert` changes it back; :func:`dense` does so
for a while, and :func:`report` says what was changed and how near dense attention it is.
:func:`distil` teaches the sketches. :class:`SketchCache` makes ``generate`` fast; :func:`save` and
:func:`load` keep sketches in files.
"""

try:
    import transformers  # noqa: F401
except ImportError as error:
    raise ImportError("smartbird.hf needs transformers: pip install 'smartbird[hf]'") from error

from smartbird.hf.attention import SketchedAttention
from smartbird.hf.cache import SketchCache
from smartbird.hf.conversion import LayerReport, convert, dense, report, revert
from smartbird.hf.distil import distil
from smartbird.hf.files import load, save

__all__ = [
    "LayerReport",
    "SketchCache",
    "SketchedAttention",
    "convert",
    "dense",
    "distil",
    "load",
    "report",
    "revert",
    "save",
]
