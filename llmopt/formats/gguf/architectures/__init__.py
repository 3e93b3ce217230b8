"""The table between Hugging Face's causal language models and llama.cpp's architectures, as data.

What llama.cpp 0.3.36's loader (``src/models/*.cpp``) reads and computes is the measure: a model is
planned only if the file says all that the model computes.
"""

from llmopt.formats.gguf.architectures.plan import (
    DroppedTensor,
    FilePlan,
    ModelFacts,
    PlannedTensor,
    plan_file,
)
from llmopt.formats.gguf.architectures.transforms import Transform

__all__ = ["DroppedTensor", "FilePlan", "ModelFacts", "PlannedTensor", "Transform", "plan_file"]
