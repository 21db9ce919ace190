"""Imports diffusers before the tests do, without the checkout's folder `kernels` in its way."""

from aligntok.runtime.foreign import without_our_kernels

with without_our_kernels():
    import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
