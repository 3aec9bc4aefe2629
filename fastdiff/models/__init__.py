"""Models that the library trains and ships."""

from fastdiff.models.dit import DiT, DiTConfig
from fastdiff.models.unet import UNet, UNetConfig

__all__ = ["DiT", "DiTConfig", "UNet", "UNetConfig"]
