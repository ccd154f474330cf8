"""The encoder's forward and input gradient written out by hand, over the ops of fastnull.ops; no autograd graph."""

from fastnull.encoder.explicit.encoder import ExplicitEncoder

__all__ = ["ExplicitEncoder"]
