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
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


def train(model, optimizer):
    """A loop with a gradient for every parameter."""
    for _ in range(120):
        for parameter in model.parameters():
            parameter.grad = 0.1 * torch.randn_like(parameter)
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

    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) >= 7
    names["torch"] = torch
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    plt.close("all")
    assert len(names["run"].forces()) > 100


def test_the_sections_lead_from_why_to_everything_else():
    sections = re.findall(r"^## (.+)$", README, flags=re.MULTILINE)
    assert sections == ["Why", "Two commands", "Attach", "Read", "Draw", "Everything else", "Sources"]


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
