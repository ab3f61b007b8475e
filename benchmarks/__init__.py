"""What measures smartbird. It is not installed: it runs from the root of the source tree.

``speed`` times attention and its rivals, ``learning`` trains models and compares what they learn,
``common`` is what both need.
"""
