"""Every code block of the README runs."""

import re
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
from typer.testing import CliRunner

from weightdyn.cli import app

mpl.use("Agg")

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks_of(text):
    return re.findall(r"^```(\w+)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


BLOCKS = blocks_of(README)
STACKS = [code for _, code in blocks_of(README.partition("## Where you train")[2].partition("\n## ")[0])]


def train(model, *optimizers):
    """A loop with a gradient for every parameter."""
    for _ in range(120):
        for parameter in model.parameters():
            parameter.grad = 0.1 * torch.randn_like(parameter)
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What a reader has by the time of the first example: a model, an optimizer and a loop."""
    from transformers import LlamaConfig, LlamaForCausalLM

    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters()), "train": train}


def test_the_commands_run_and_then_the_python_examples_in_their_order(names, tmp_path, monkeypatch):
    import matplotlib.pyplot as plt

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    lines = [line for language, code in BLOCKS if language == "console" for line in code.splitlines()]
    commands = [
        line.removeprefix("$ weightdyn ").split() for line in lines if line.startswith("$ weightdyn ")
    ]
    assert [command[0] for command in commands][:2] == ["train", "plot"]
    for command in commands:
        if command[0] == "train":  # the same at a size for a test
            command = [*command, "--steps", "20", "--warmup", "2", "--batch-size", "1", "--seq-len", "16"]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "runs/tiny/figures/force_budget.png").exists()

    blocks = [code for language, code in BLOCKS if language == "python" and code not in STACKS]
    assert len(blocks) >= 7
    names["torch"] = torch
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    plt.close("all")
    assert len(names["run"].forces()) > 100


class _Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, i):
        tokens = torch.arange(i, i + 8) % 64
        return {"input_ids": tokens, "labels": tokens}


def stack_of(code):
    return next(
        name for name in ("Trainer(model", "lightning", "accelerator", "fully_shard", "muon") if name in code
    )


@pytest.mark.parametrize("code", STACKS, ids=stack_of)
@pytest.mark.filterwarnings("ignore")  # of the frameworks
def test_each_place_where_one_trains_has_lines_that_run(code, names, tmp_path):
    import weightdyn as wd

    names |= {"torch": torch, "wd": wd, "loader": torch.utils.data.DataLoader(_Tokens(), batch_size=2)}
    stack, model = stack_of(code), names["model"]
    if stack == "Trainer(model":
        pytest.importorskip("accelerate")
        from transformers import Trainer, TrainingArguments

        args = TrainingArguments(
            output_dir="output", max_steps=20, report_to=[], use_cpu=True, disable_tqdm=True
        )
        names |= {"Trainer": Trainer, "args": args, "data": _Tokens()}
    elif stack == "lightning":
        lightning = pytest.importorskip("lightning")

        class Module(lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.model = model

            def training_step(self, batch, i):
                return self.model(**batch).loss

            def configure_optimizers(self):
                return torch.optim.AdamW(self.parameters())

        names |= {"lightning": lightning, "module": Module()}
    elif stack == "accelerator":
        names["accelerator"] = pytest.importorskip("accelerate").Accelerator(cpu=True)
    elif stack == "fully_shard":
        torch.distributed.init_process_group(
            "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
        )
        names["fully_shard"] = torch.distributed.fsdp.fully_shard
    try:
        exec(compile(code, "README.md", "exec"), names)
    finally:
        if stack == "fully_shard":
            torch.distributed.destroy_process_group()
    runs = [wd.RunLog(path) for path in (tmp_path / "runs").glob("*")] or [names["log"].run]
    if stack == "accelerator":
        names["log"].close()
    for run in runs:
        assert len(run.forces()) > 20


def test_the_sections_lead_from_why_to_everything_else():
    sections = re.findall(r"^## (.+)$", README, flags=re.MULTILINE)
    assert sections == [
        *("Why", "Two commands", "Attach", "Where you train", "Read", "Draw", "Everything else", "Sources")
    ]


def test_every_name_that_the_readme_uses_is_there():
    import weightdyn as wd

    for dotted in set(re.findall(r"\bwd((?:\.\w+)+)", README)):
        found = wd
        for name in dotted[1:].split("."):
            found = getattr(found, name)
            if not isinstance(found, type(wd)):
                break


def test_the_other_blocks_are_commands_of_make_and_pip():
    assert {language for language, _ in BLOCKS} == {"python", "console"}
    assert "make demo" in README
    assert (Path(__file__).parent.parent / "data/demo.png").exists()
