"""QuEST's two stages of finetuning."""

from stepquant.recipes import QuEST
from stepquant.recipes.stages import Finetune


def test_each_stage_has_a_separate_weight_for_the_global_loss():
    stages = [
        stage
        for recipe in (QuEST(critical="attention"), QuEST(critical="both", time_global_weight=0.0, global_weight=0.0))
        for stage in recipe.stages()
        if isinstance(stage, Finetune)
    ]
    assert [(stage.name, stage.global_weight) for stage in stages] == [
        ("Aligning time layers", 1), ("Aligning critical layers", 2),
        ("Aligning time layers", 0), ("Aligning critical layers", 0),
    ]  # fmt: skip
