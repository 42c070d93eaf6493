"""Distillation losses: one method a file, one registry. Needs torch alone."""

from kdvit.losses.deit import DeiT
from kdvit.losses.dkd import DKD
from kdvit.losses.fitnet import FitNet
from kdvit.losses.kd import KD
from kdvit.losses.loss import Loss, get, make, names, register
from kdvit.losses.normkd import NormKD
from kdvit.losses.standardized import Standardized
from kdvit.losses.tinymim import TinyMIM
from kdvit.losses.vitkd import ViTKD

__all__ = [
    "DKD",
    "KD",
    "DeiT",
    "FitNet",
    "Loss",
    "NormKD",
    "Standardized",
    "TinyMIM",
    "ViTKD",
    "get",
    "make",
    "names",
    "register",
]
