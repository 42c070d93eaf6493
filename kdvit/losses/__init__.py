"""Distillation losses: one method a file, one registry. Needs torch alone."""

from kdvit.losses.afd import AFD
from kdvit.losses.at import AT
from kdvit.losses.atkd import ATKD
from kdvit.losses.attention_probe import AttentionProbe
from kdvit.losses.attndistill import AttnDistill
from kdvit.losses.ca_mkd import CAMKD
from kdvit.losses.cc import CC
from kdvit.losses.cfd import CFD
from kdvit.losses.cls_dense import ClsDense
from kdvit.losses.cls_queue import ClsQueue
from kdvit.losses.crd import CRD
from kdvit.losses.cross_arch import CrossArch
from kdvit.losses.crosskd import CrossKD
from kdvit.losses.cskd import CSKD
from kdvit.losses.cwd import CWD
from kdvit.losses.dearkd import DearKD
from kdvit.losses.deit import DeiT
from kdvit.losses.dense import Dense
from kdvit.losses.dino_heads import DINOHeads
from kdvit.losses.dist import DIST
from kdvit.losses.dkd import DKD
from kdvit.losses.dmkd import DMKD
from kdvit.losses.each_teacher import EachTeacher
from kdvit.losses.factory import make
from kdvit.losses.fitnet import FitNet
from kdvit.losses.ft import FT
from kdvit.losses.kd import KD
from kdvit.losses.kdfas import KDFAS
from kdvit.losses.loss import Loss, Mismatch, get, names, register
from kdvit.losses.manifold import Manifold
from kdvit.losses.mekd import MEKD
from kdvit.losses.mgd import MGD
from kdvit.losses.minilm import MiniLM
from kdvit.losses.mkd import MKD
from kdvit.losses.mlld import MLLD
from kdvit.losses.mmkd import MMKD
from kdvit.losses.mr_mae import MRMAE
from kdvit.losses.mtkd_ssr import MTKDSSR
from kdvit.losses.nkd import NKD
from kdvit.losses.normkd import NormKD
from kdvit.losses.nst import NST
from kdvit.losses.ntce import NTCE
from kdvit.losses.ofakd import OFAKD
from kdvit.losses.ofd import OFD, batch_norm_margin
from kdvit.losses.pfi import PFI
from kdvit.losses.pkd import PKD
from kdvit.losses.pkt import PKT
from kdvit.losses.promptkd import PromptKD
from kdvit.losses.prototype_head import PrototypeHead
from kdvit.losses.psd import PSD
from kdvit.losses.ptloss import PTLoss
from kdvit.losses.reviewkd import ReviewKD
from kdvit.losses.rkd import RKD
from kdvit.losses.sam_net import SAMNet
from kdvit.losses.scheduled import Scheduled
from kdvit.losses.sdd import SDD
from kdvit.losses.simkd import SimKD
from kdvit.losses.skd import SKD
from kdvit.losses.sp import SP
from kdvit.losses.srrl import SRRL
from kdvit.losses.standardized import Standardized
from kdvit.losses.takt import TAKT
from kdvit.losses.tat import TaT
from kdvit.losses.tfkd import TfKD
from kdvit.losses.tinymim import TinyMIM
from kdvit.losses.tinyvit import TinyViT
from kdvit.losses.ttm import TTM
from kdvit.losses.uskd import USKD
from kdvit.losses.vid import VID
from kdvit.losses.vit_frd import ViTFRD
from kdvit.losses.vitkd import ViTKD
from kdvit.losses.wttm import WTTM

__all__ = [
    "AFD",
    "AT",
    "ATKD",
    "CAMKD",
    "CC",
    "CFD",
    "CRD",
    "CSKD",
    "CWD",
    "DIST",
    "DKD",
    "DMKD",
    "FT",
    "KD",
    "KDFAS",
    "MEKD",
    "MGD",
    "MKD",
    "MLLD",
    "MMKD",
    "MRMAE",
    "MTKDSSR",
    "NKD",
    "NST",
    "NTCE",
    "OFAKD",
    "OFD",
    "PFI",
    "PKD",
    "PKT",
    "PSD",
    "RKD",
    "SDD",
    "SKD",
    "SP",
    "SRRL",
    "TAKT",
    "TTM",
    "USKD",
    "VID",
    "WTTM",
    "AttentionProbe",
    "AttnDistill",
    "CrossArch",
    "ClsDense",
    "ClsQueue",
    "CrossKD",
    "DearKD",
    "DeiT",
    "DINOHeads",
    "Dense",
    "EachTeacher",
    "FitNet",
    "Loss",
    "Manifold",
    "MiniLM",
    "Mismatch",
    "NormKD",
    "PTLoss",
    "PromptKD",
    "PrototypeHead",
    "ReviewKD",
    "SAMNet",
    "Scheduled",
    "SimKD",
    "Standardized",
    "TaT",
    "TfKD",
    "TinyMIM",
    "TinyViT",
    "ViTFRD",
    "ViTKD",
    "batch_norm_margin",
    "get",
    "make",
    "names",
    "register",
]
