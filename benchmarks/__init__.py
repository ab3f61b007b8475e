"""What measures smartbird. It is not installed: it runs from the root of the source tree.

``speed`` times attention and its rivals, ``distributed`` measures it between processes, ``gpu``
checks and times it on a GPU, ``learning`` trains models and compares what they learn, ``language``
reads with pretrained ones, ``overview`` tells of all of them, ``common`` is what they need.
"""
