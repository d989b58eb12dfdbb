"""Models with an adapter merged into plain Flair models, and exported to ONNX.

May import ``models`` and what lies below it.
"""
