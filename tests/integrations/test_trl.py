"""TRL's trainers are transformers': the same callback in a supervised and in a preference training."""

import pytest
from frameworks import TOKENS, assert_every_update_is_there_once, assert_forces_are_true, tiny_llama
from test_transformers import NAMES, Watch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import weightdyn as wd
from weightdyn.integrations.transformers import ForceCallback

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # of what it asks of transformers

TEXTS = [" ".join(f"t{token % 30}" for token in row) for row in TOKENS.tolist()]


def make_tokenizer():
    words = {f"t{i}": i for i in range(30)} | {"<pad>": 30, "<eos>": 31}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_sft(args, **common):
    data = datasets.Dataset.from_dict({"text": TEXTS})
    return trl.SFTTrainer(tiny_llama(), trl.SFTConfig(max_length=16, **args), train_dataset=data, **common)


def make_dpo(args, **common):
    pairs = {"prompt": TEXTS, "chosen": [" t1 t2 t3"] * 64, "rejected": [" t4 t5"] * 64}
    data = datasets.Dataset.from_dict(pairs)
    config = trl.DPOConfig(**args)
    return trl.DPOTrainer(tiny_llama(), ref_model=tiny_llama(1), args=config, train_dataset=data, **common)


@pytest.mark.parametrize(("make", "own"), [(make_sft, "mean_token_accuracy"), (make_dpo, "rewards/margins")])
def test_the_forces_of_trl_are_those_of_a_float64_loop_and_go_out_with_its_metrics(tmp_path, make, own):
    args = {
        "output_dir": str(tmp_path), "max_steps": 4, "logging_steps": 2, "per_device_train_batch_size": 4,
        "learning_rate": 1e-2, "weight_decay": 0.1, "report_to": [], "use_cpu": True, "bf16": False,
        "save_strategy": "no", "dataloader_pin_memory": False, "disable_tqdm": True,
    }  # fmt: skip
    watch = Watch()
    trainer = make(args, processing_class=make_tokenizer(), callbacks=[watch, ForceCallback()])
    trainer.train()
    run = wd.RunLog(tmp_path / "weightdyn")
    assert_every_update_is_there_once(run.forces(), NAMES, 4)
    assert len(watch.truth.forces) == 4 * len(NAMES)
    assert_forces_are_true(run.forces(), watch.truth)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["step"] for row in rows] == [2, 4]
    assert all(own in row and "forces/selection/alignment_share" in row for row in rows)
    assert own in run.metrics()
