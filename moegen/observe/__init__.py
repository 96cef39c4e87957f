"""Watching the routed layers of a model in training: tables, pages, TensorBoard, JSON."""

from moegen.observe.recorder import Recorder as Recorder

__all__ = ["Recorder"]
