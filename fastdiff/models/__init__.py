"""Models that the library trains and ships."""

from fastdiff.models.autoencoder import Autoencoder, AutoencoderConfig
from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.unet import UNet, UNetConfig

__all__ = ["Autoencoder", "AutoencoderConfig", "DiT", "DiTConfig", "UNet", "UNetConfig"]
