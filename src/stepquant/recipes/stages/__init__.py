"""The stages that recipes are made of."""

from stepquant.recipes.stages.finetuning import Finetune, RankLayers, Train
from stepquant.recipes.stages.precision import AllocateSteps
from stepquant.recipes.stages.quantizers import AddQuantizers, CalibrateRanges, Smooth
from stepquant.recipes.stages.reconstruction import ReconstructBlocks, ReconstructTimeLayers
from stepquant.recipes.stages.samples import CollectSamples

__all__ = [
    "AddQuantizers",
    "AllocateSteps",
    "CalibrateRanges",
    "CollectSamples",
    "Finetune",
    "RankLayers",
    "ReconstructBlocks",
    "ReconstructTimeLayers",
    "Smooth",
    "Train",
]
