"""For model files: what of :mod:`cp_convert.model.instantiate` is of use to them.

``from cp_convert.instantiate import randomised`` is how model files gave a model without weights
numbers that let every layer matter before the stages had folders of their own. This path stays.
"""

from .model.instantiate import build, example_inputs, model_class, published_config, randomised

__all__ = ["build", "example_inputs", "model_class", "published_config", "randomised"]
