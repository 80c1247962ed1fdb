"""QuEST's two stages of finetuning, as the recipe asks for them."""

from test_job import job

from stepquant.recipes import Job
from stepquant.recipes.quest import quest


def test_each_stage_has_a_weight_of_its_own_for_the_global_loss(unconditional_pipeline, tmp_path, monkeypatch):
    stages = []
    for stage in ("smoothing", "reconstruct", "calibrate_ranges"):
        monkeypatch.setattr(Job, stage, lambda *_, **__: None)
    monkeypatch.setattr(Job, "finetune", lambda _job, _model, _samples, settings: stages.append(settings))
    one = job(unconditional_pipeline, tmp_path)
    quest(one, critical="attention")
    quest(one, critical="attention", time_global_weight=0.0, global_weight=0.0)
    found = [(stage.name, stage.global_weight) for stage in stages]
    assert found == [
        ("Aligning time layers", 1), ("Aligning critical layers", 2),
        ("Aligning time layers", 0), ("Aligning critical layers", 0),
    ]  # fmt: skip
