"""What the names of published checkpoints say, by the names that their repositories have."""

import pytest

from weightdyn.files.revisions import choose_series, read_name

NAMES = {
    "step143000": (143000, ""),  # Pythia
    "step738020-tokens3095B": (738020, ""),  # OLMo
    "stage1-step1000-tokens5B": (1000, "stage1"),  # OLMo 2
    "stage2-ingredient1-step1000-tokens5B": (1000, "stage2-ingredient1"),
    "stage1-step-40000": (40000, "stage1"),  # SmolLM3
    "stage3-step-4720000": (4720000, "stage3"),
    "lc-4k-to-32k-step-4000": (4000, "lc-4k-to-32k"),
    "step-125000": (125000, ""),  # SmolLM2
    "step-001000-2BT": (1000, ""),  # FineWeb's ablations
    "ckpt_000": (0, ""),  # Amber
    "CrystalCoder_phase1_checkpoint_055500": (55500, "CrystalCoder_phase1"),
    "CrystalCoder_phase3_checkpoint_027728": (27728, "CrystalCoder_phase3"),
    "1000": (1000, ""),
    "checkpoint-500": (500, ""),  # transformers
    "checkpoint_3": (3, ""),  # Accelerate
    "epoch=0-step=500": (500, ""),  # Lightning
    "epoch=2-step=500-val_loss=0.31": (500, ""),
    "epoch=2-step=500-v1": (500, "v1"),
    "global_step500": (500, ""),  # DeepSpeed, GPT-NeoX
    "step1000-unsharded": (1000, "unsharded"),
    "iter_0001000": (1000, ""),  # Megatron
    "model_step20": (20, "model"),
    f"step{2**63}": (2**63, ""),
    "step" + "9" * 200: (2**63, ""),
    "step1" + "-x" * 200: None,  # longer than names are
    "main": None,
    "step-50K-105b": None,  # 50,000, rounded
    "TinyLlama-1.1B-intermediate-step-240k-503b": None,
    "footstep5": None,
    "step1.5": None,
    "step": None,
    "": None,
}


@pytest.mark.parametrize("name", NAMES, ids=lambda name: name[:40])
def test_names_of_published_checkpoints_are_read(name):
    found = read_name(name)
    assert (found and (found.step, found.stage)) == NAMES[name]


def chosen(names, stage=None):
    return choose_series([(name, name) for name in names], "the source", stage)


def test_the_lowest_stage_is_taken_and_what_is_left_out_is_said():
    names = [f"stage{k}-step{i}" for k, i in ((2, 9), (1, 1), (1, 5), (3, 2))] + ["step-5K", "main", "v2"]
    found = chosen(names)
    assert found.places == [(1, "stage1-step1"), (5, "stage1-step5")]
    left, strange = found.remarks
    assert "taken is 'stage1' (2 checkpoints, 1 to 5); left out: " in left
    assert "'stage2' (1 checkpoint, 9 to 9)" in left
    assert "'stage3' (1 checkpoint, 2 to 2)" in left
    assert "stage=['stage1', 'stage2'] those whose steps go on" in left, "stage 3 begins anew"
    assert strange == "left out, since they name no step: step-5K"
    assert chosen(names, ["stage1", "stage2"]).remarks == [strange]


@pytest.mark.parametrize(
    ("names", "stage", "message"),
    [
        (
            ["step1-seed-a", "step2-seed-b"],
            None,
            r"which is meant is unknown; give one of 'seed-a' .*'seed-b'",
        ),
        (["stage1-a-step1", "stage1-b-step1"], None, "which is meant is unknown"),
        (["stage1-step1"], "stage2", r"the source has no 'stage2'; it has 'stage1' \(1 checkpoint"),
        (["stage1-step1", "stage2-step1"], ["stage1", "stage2"], "'stage2' .* do not go on from .* 'stage1'"),
        (["stage1-step5", "stage2-step1"], ["stage1", "stage2"], "'stage2' .* do not go on from .* 'stage1'"),
        (["stage1-step1", "stage2-step5"], ["stage2", "stage1"], "'stage1' .* do not go on from .* 'stage2'"),
        (["step1"], [], "stage must be the name of a stage"),
        (["step1"], 1, "stage must be the name of a stage"),
    ],
)
def test_what_cannot_be_one_series_is_refused(names, stage, message):
    with pytest.raises((ValueError, TypeError), match=message):
        chosen(names, stage)


@pytest.mark.parametrize(
    ("names", "counted"),
    [
        ([f"ckpt_{i:03}" for i in range(359)], True),
        ([f"ckpt_{i:03}" for i in (0, 1, 2, 5, 6)], True),
        (["checkpoint_0", "checkpoint_1"], True),
        (["1", "2", "3"], True),
        (["1000", "2000"], False),
        (["checkpoint_500", "checkpoint_1000"], False),
        (["checkpoint-1", "checkpoint-2"], False),
        (["step0", "step1", "step2"], False),
        (["checkpoint_7"], False),
    ],
)
def test_numbers_that_count_checkpoints_are_told_from_steps(names, counted):
    found = chosen(names)
    assert len(found.places) == len(names)
    assert found.counted is counted
    assert bool([remark for remark in found.remarks if "need {update: place} as source" in remark]) is counted


def test_a_bare_number_beside_named_steps_is_a_version():
    assert chosen(["step1000", "2"]).places == [(1000, "step1000")]
