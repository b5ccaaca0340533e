from __future__ import annotations
class Foveate:
    def __init__(self, model, processor):
        self.model, self.processor = model, processor
class Answer: pass
def load(): pass
