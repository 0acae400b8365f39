"""The forward pass against NumPy, a published checkpoint and itself by other ways; initial values; taps."""

import functools
import gzip
import re

import jax
import jax.numpy as jnp
import llama2c
import numpy as np
import pytest
from flax import nnx
from numpy_model import NumpyModel, random_params

from tinylm import model as model_room
from tinylm.config import ModelConfig
from tinylm.generate import Sampling, generate_tokens
from tinylm.model import Cache, Transformer, attend, attend_fused, dropout, shapes, sites
from tinylm.presets import preset
from tinylm.taps import compose, patching, recording, untouched, wants, within
from tinylm.weights import assign, bind, check_tokens, named, pure

SMALL = {"vocab": 61, "context": 24, "width": 32, "layers": 2, "heads": 4}
LLAMA = ModelConfig(**SMALL, kv_heads=2)
NEO = ModelConfig(**SMALL, **{**preset("tinystories-1M").to_dict(), "hidden": 0} | SMALL | {"kv_heads": 4, "head_width": 8, "window": (0, 5)}) if False else None
