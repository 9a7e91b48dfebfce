"""Trainings that were killed: one process imports what is slow to import, and forks them."""

import importlib.util

import pytest
from frameworks import run_to_the_kill


@pytest.fixture(scope="session")
def killed(tmp_path_factory):
    """Their folders. Each was killed at update 7 of 10, when its checkpoint was of update 4."""
    scenarios = {
        "transformers": ("test_transformers", False, 7),
        "transformers, the model only": ("test_transformers", False, 7, True),
        "accelerate": ("test_accelerate", 7, False, 10),
    }
    if importlib.util.find_spec("lightning") is not None:
        scenarios["lightning"] = ("test_lightning", 7)
    folders = {name: tmp_path_factory.mktemp("killed") for name in scenarios}
    run_to_the_kill([(module, (str(folders[name]), *rest)) for name, (module, *rest) in scenarios.items()])
    return folders
